"""Masks that hospitals' systems write and that say less, or something else, than they seem to."""

from __future__ import annotations

import copy
import gzip
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
from dicom_builders import (
    MASKS,
    VOLUME,
    contour,
    derived,
    image,
    item,
    numbers,
    plain_segmentation,
    put,
    same,
    segmentation,
    structures,
    used,
    volume,
)
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, JPEG2000Lossless, RLELossless
from test_ingest_masks import as_nifti, referring, square

pytestmark = pytest.mark.usefixtures("in_this_process")
BOX = (2.4, 3.4, 12.6, 15.6)
FILLED = np.zeros((20, 24), np.uint8)
FILLED[3:13, 4:16] = 1
EMPTY = np.zeros_like(FILLED)


def drawn(sources: list[Dataset], *contours: Dataset) -> Dataset:
    return structures(contours, listed=sources, space=sources[0].FrameOfReferenceUID)


@pytest.mark.parametrize("kind", ["POINT", "OPEN_PLANAR", "OPEN_NONPLANAR", "", None])
def test_a_region_of_points_or_open_lines_alone_makes_nothing_background(kind: str | None, tmp_path: Path):
    sources = volume(VOLUME)
    made = contour(square(sources[1], *BOX), sources[1], kind or "")
    if kind is None:
        del made.ContourGeometricType
    put(tmp_path, [*sources, drawn(sources, made)])
    assert numbers(used(tmp_path)[2]) == [108, 117, 124]


@pytest.mark.parametrize("start", [0, 1])
def test_a_contour_that_is_written_twice_is_no_hole_in_itself(start: int, tmp_path: Path):
    sources = volume(VOLUME)
    around, inside = square(sources[1], *BOX), square(sources[1], 5.6, 6.6, 8.4, 9.4)
    twice = [contour(around, sources[1]), contour(inside, sources[1]), contour(np.roll(around, start, 0), sources[1])]
    put(tmp_path, [*sources, drawn(sources, *twice)])
    want = FILLED.copy()
    want[6:9, 7:10] = 0
    assert same(used(tmp_path)[1], [EMPTY, want, EMPTY, EMPTY, EMPTY])


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("kind", ["CLOSED_PLANAR", "CLOSEDPLANAR_XOR"])
def test_contours_that_overlap_in_part_are_one_area_unless_they_say_xor(kind: str, order: int, tmp_path: Path):
    sources = volume(VOLUME)
    boxes = [
        BOX,
        (9.4, 12.4, 16.6, 20.6),
        (5.6, 6.6, 8.4, 9.4),
        (6.5, 7.5, 7.5, 8.5),
    ]  # two that overlap, a hole, an island in it
    put(tmp_path, [*sources, drawn(sources, *(contour(square(sources[1], *box), sources[1], kind) for box in boxes[::order]))])
    want = FILLED.copy()
    want[10:17, 13:21] = 1
    want[6:9, 7:10] = 0
    want[7, 8] = 1
    if kind == "CLOSEDPLANAR_XOR":
        want[10:13, 13:16] = 0
    assert same(used(tmp_path)[1], [EMPTY, want, EMPTY, EMPTY, EMPTY])


@pytest.mark.parametrize("points", [None, [1.0, 2.0], ["a", "b", "c"]])
def test_a_broken_contour_of_a_region_that_nobody_asks_for_costs_nothing(points: list[object] | None, tmp_path: Path):
    sources = volume(VOLUME)
    made, broken = drawn(sources, contour(square(sources[1], *BOX), sources[1])), item(ContourGeometricType="POINT")
    if points:
        broken.add_new("ContourData", "LO" if isinstance(points[0], str) else "DS", points)
    made.StructureSetROISequence.append(item(ROINumber=2, ROIName="body"))
    made.ROIContourSequence.insert(0, item(ReferencedROINumber=2, ContourSequence=[broken]))
    put(tmp_path, [*sources, made])
    assert same(used(tmp_path)[1], [EMPTY, FILLED, EMPTY, EMPTY, EMPTY])


@pytest.mark.parametrize("kind", ["", "BINARY", "labelmap", None])
def test_a_label_map_is_one_whatever_type_it_says(kind: str | None, tmp_path: Path):
    sources = volume(VOLUME)
    made = segmentation(sources, MASKS, "LABELMAP", omit_empty_frames=False)
    made.SegmentationType = kind
    if kind is None:
        del made.SegmentationType
    put(tmp_path, [*sources, made])
    assert same(used(tmp_path)[1], MASKS)


@pytest.mark.parametrize("side", ["Rows", "Columns"])
def test_frames_that_are_larger_than_the_pixels_that_are_there_are_refused(side: str, tmp_path: Path):
    sources = volume(VOLUME)
    made = segmentation(sources, MASKS, "BINARY", omit_empty_frames=False)
    setattr(made, side, made[side].value + 1)
    put(tmp_path, [*sources, made])
    _, masks, data = used(tmp_path)
    assert (masks, set(numbers(data))) == ([], {108, 118})


@pytest.mark.parametrize("first", ["lesion", "edema"])
def test_two_segments_of_one_number_cost_their_file(first: str, tmp_path: Path):
    sources = volume(VOLUME)
    made = segmentation(sources, MASKS, "BINARY", names=(first,))
    other = copy.deepcopy(made.SegmentSequence[0])
    other.SegmentLabel = "edema" if first == "lesion" else "lesion"
    made.SegmentSequence.append(other)
    put(tmp_path, [*sources, made])
    _, masks, data = used(tmp_path)
    assert (masks, numbers(data)) == ([], [108, 117, 124])


@pytest.mark.parametrize("harm", ["no frames", "fewer frames", "no segment", "another segment"])
def test_frames_that_nothing_is_known_of_make_nothing_background(harm: str, tmp_path: Path):
    sources = volume(VOLUME)
    made = referring("as a list", sources)
    groups = made.PerFrameFunctionalGroupsSequence
    if harm == "no frames":
        del made.PerFrameFunctionalGroupsSequence
    elif harm == "fewer frames":
        del groups[3]
    elif harm == "no segment":
        del groups[3].SegmentIdentificationSequence
    else:
        groups[3].SegmentIdentificationSequence[0].ReferencedSegmentNumber = 7
    put(tmp_path, [*sources, made])
    assert numbers(used(tmp_path)[2]) == [108, 117, 124]


@pytest.mark.parametrize(("mm", "fits"), [("0.49", True), ("0.488", True), ("0.5", False)])
def test_a_mask_that_names_its_image_lies_on_its_pixels_whose_distance_it_rounds(mm: str, fits: bool, tmp_path: Path):
    """Over some hundred pixels what was rounded adds up to more than a grid may be off."""
    greys, masks = (np.tile(stack, (1, 8, 8)) for stack in (VOLUME, MASKS))
    sources = volume(greys, spacing=(0.48828125, 0.48828125))
    made = segmentation(sources, masks, "BINARY")
    made.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing = [mm, mm]
    put(tmp_path, [*sources, made])
    _, found, data = used(tmp_path)
    assert same(found, masks if fits else [])
    assert (121 in numbers(data)) is not fits


@pytest.mark.parametrize(("others", "fits"), [((), True), ((0, 1), False), ((2, 2), True)])
def test_a_frame_without_a_place_marks_no_two_slices_that_it_was_derived_from(
    others: tuple[int, ...], fits: bool, tmp_path: Path
):
    """As where a system names the slices beside it as well, whose marks are others."""
    sources = volume(VOLUME)
    groups = [item(DerivationImageSequence=[derived(one)]) for one in sources]
    for number in others:
        groups[2].DerivationImageSequence.append(derived(sources[number]))
    put(tmp_path, [*sources, plain_segmentation(MASKS, groups)])
    _, masks, data = used(tmp_path)
    assert same(masks, MASKS if fits else [])
    assert (122 in numbers(data)) is not fits


@pytest.mark.parametrize("count", [1, 2])
def test_a_mask_of_one_image_without_a_place_need_not_name_it_frame_by_frame(count: int, tmp_path: Path):
    """As of a chest X-ray; of two images nobody knows which of them is meant."""
    sources = [image(grey) for grey in VOLUME[:count]]
    made = plain_segmentation(MASKS[2:3], [Dataset()])
    named = [item(ReferencedSOPClassUID=one.SOPClassUID, ReferencedSOPInstanceUID=one.SOPInstanceUID) for one in sources]
    made.ReferencedSeriesSequence = [item(SeriesInstanceUID=sources[0].SeriesInstanceUID, ReferencedInstanceSequence=named)]
    put(tmp_path, [*sources, made])
    _, found, data = used(tmp_path)
    assert same(found, MASKS[2:3] if count == 1 else [])
    assert (121 in numbers(data)) is (count == 2)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, RLELossless])
def test_a_value_of_a_label_map_that_no_segment_describes_is_not_background(syntax: str, tmp_path: Path):
    sources = volume(VOLUME)
    made = segmentation(sources, MASKS * 2, "LABELMAP", ("bone", "lesion"), omit_empty_frames=False)
    stored = made.pixel_array.copy()
    stored[2, 0, 0] = 7
    made.PixelData = stored.tobytes()
    if syntax == RLELossless:
        made.compress(RLELossless, generate_instance_uid=False)
    put(tmp_path, [*sources, made])
    classes, data = used(tmp_path)[1:]
    assert same(classes, [MASKS[n] for n in (0, 1, 3, 4)])
    assert any(fault.number == 106 and "value 7" in str(fault) for fault in data.exclusions)


WHOLES = [
    ("FRACTIONAL", 255, [0, 127, 128, 255], [0, 0, 1, 1]),
    ("FRACTIONAL", 1, [0, 0, 1, 1], [0, 0, 1, 1]),
    ("FRACTIONAL", None, [0, 30, 200, 255], 117),
    ("FRACTIONAL", 100, [0, 30, 60, 101], 106),
    ("FRACTIONAL", 1, [0, 30, 200, 255], 106),
    ("BINARY", None, [0, 0, 255, 255], [0, 0, 1, 1]),
    ("BINARY", 255, [0, 0, 1, 1], [0, 0, 1, 1]),
    ("BINARY", None, [0, 0, 1, 255], 106),
]


@pytest.mark.parametrize(("kind", "whole", "values", "want"), WHOLES)
def test_shares_without_a_whole_that_fits_them_mark_nothing(
    kind: str, whole: int | None, values: list[int], want: list[int] | int, tmp_path: Path
):
    """Without it every value but 0 would pass for a mark."""
    sources, frame = volume(VOLUME[:1]), np.zeros((1, 20, 24), np.uint8)
    frame[0, 4:8, 9] = values
    made = plain_segmentation(frame, [item(DerivationImageSequence=[derived(sources[0])])], SegmentationType=kind)
    made.BitsAllocated, made.BitsStored, made.HighBit, made.PixelData = 8, 8, 7, frame.tobytes()
    if whole is not None:
        made.MaximumFractionalValue = whole
    put(tmp_path, [*sources, made])
    _, masks, data = used(tmp_path)
    if isinstance(want, int):
        assert want in numbers(data)
    else:
        assert masks[0][4:8, 9].tolist() == want
        assert masks[0].sum() == 2


@pytest.mark.parametrize("harm", ["", "a byte each", "twice as deep", "four more bytes"])
def test_frames_that_lie_elsewhere_than_the_standard_has_them_are_refused(harm: str, tmp_path: Path):
    """Those after the first would be read shifted; 19 x 23 pixels are no whole number of bytes."""
    sources, frames = volume(VOLUME[:, 1:, 1:]), MASKS[:, 1:, 1:]
    made = plain_segmentation(frames, [item(DerivationImageSequence=[derived(one)]) for one in sources])
    if harm == "a byte each":
        packed = b"".join(np.packbits(frame.ravel(), bitorder="little").tobytes() for frame in frames)
        made.PixelData = packed + b"\0" * (len(packed) % 2)
    elif harm == "twice as deep":
        made.BitsAllocated, made.BitsStored, made.HighBit, made.PixelData = 8, 8, 7, frames.astype("<u2").tobytes()
    elif harm:
        made.PixelData += bytes(4)
    put(tmp_path, [*sources, made])
    _, masks, data = used(tmp_path)
    fits = harm in {"", "four more bytes"}
    assert same(masks, frames if fits else [])
    assert (118 in numbers(data)) is not fits


@pytest.mark.parametrize("harm", [0, 1, 5, -5])
@pytest.mark.parametrize("form", ["bits", "shares", "label map"])
def test_frames_that_were_deflated_one_by_one_are_read(form: str, harm: int, tmp_path: Path):
    """One byte more is padding where a frame has an odd number of them."""
    sources, frames = volume(VOLUME[:, 1:, 1:]), MASKS[:, 1:, 1:]
    stored = {"bits": frames, "shares": frames * np.uint8(200), "label map": frames.astype("<u2") * 700}[form]
    made = plain_segmentation(frames, [item(DerivationImageSequence=[derived(one)]) for one in sources])
    raws = [np.packbits(one.ravel(), bitorder="little").tobytes() if form == "bits" else one.tobytes() for one in stored]
    if form != "bits":
        made.BitsAllocated = made.BitsStored = 8 * stored.itemsize
        made.HighBit, made.MaximumFractionalValue = made.BitsStored - 1, 255
        made.SegmentationType = "FRACTIONAL" if form == "shares" else "LABELMAP"
        made.SegmentSequence[0].SegmentNumber = 700 if form == "label map" else 1
    deflated = [zlib.compress(raw[:harm] if harm < 0 else raw + bytes(harm), wbits=-15) for raw in raws]
    made.PixelData = encapsulate(deflated)
    made["PixelData"].VR = "OB"
    made["PixelData"].is_undefined_length = True
    made.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.8.1"
    put(tmp_path, sources)
    made.save_as(tmp_path / "export/seg", implicit_vr=False, little_endian=True, force_encoding=True)
    _, masks, data = used(tmp_path)
    fits = harm in {0, len(raws[0]) % 2}
    assert same(masks, frames if fits else [])
    assert (118 in numbers(data)) is not fits


def test_a_compressed_frame_of_another_size_than_its_object_says_is_not_decoded(tmp_path: Path):
    pixels, masks = (stack.repeat(2, axis=1).repeat(2, axis=2) for stack in (VOLUME, MASKS))
    sources = volume(pixels)
    made = segmentation(sources, masks, "LABELMAP", transfer_syntax_uid=JPEG2000Lossless, omit_empty_frames=False)
    frames = [bytearray(frame) for frame in generate_frames(made.PixelData, number_of_frames=5)]
    struct.pack_into(">II", frames[2], frames[2].index(b"\xff\x4f\xff\x51") + 8, 40000, 40000)
    made.PixelData = encapsulate([bytes(frame) for frame in frames])
    put(tmp_path, [*sources, made])
    classes, data = used(tmp_path)[1:]
    assert same(classes, [masks[n] for n in (0, 1, 3, 4)])
    assert any(fault.number == 118 and "40000 x 40000" in str(fault) for fault in data.exclusions)


@pytest.mark.parametrize(("unit", "of_mm"), [("micron", 1e3), ("meter", 1e-3), ("mm", 1.0), ("unknown", 1.0)])
def test_a_nifti_mask_lies_where_its_unit_of_length_says(unit: str, of_mm: float, tmp_path: Path):
    put(tmp_path, volume(VOLUME))
    made = as_nifti(MASKS, (2, 1, 0), [])
    scaled = nibabel.Nifti1Image(np.asarray(made.dataobj), np.diag([of_mm, of_mm, of_mm, 1.0]) @ made.affine)
    scaled.header.set_xyzt_units(unit, "sec")
    nibabel.save(scaled, tmp_path / "export/m.nii.gz")
    assert same(used(tmp_path)[1], MASKS)


def in_two_members(content: bytes) -> bytes:
    return gzip.compress(content[:100]) + gzip.compress(content[100:])


def with_a_long_name(content: bytes) -> bytes:
    packed = bytearray(gzip.compress(content))
    packed[3] |= 8
    return bytes(packed[:10]) + b"n" * 400 + b"\0" + bytes(packed[10:])


@pytest.mark.parametrize("pack", [in_two_members, with_a_long_name])
def test_a_gzip_file_of_any_form_is_looked_into(pack: Callable[[bytes], bytes], tmp_path: Path):
    put(tmp_path, volume(VOLUME))
    (tmp_path / "export/m.nii.gz").write_bytes(pack(as_nifti(MASKS, (2, 1, 0), []).to_bytes()))
    assert same(used(tmp_path)[1], MASKS)


@pytest.mark.parametrize("kind", [nibabel.Nifti1Pair, nibabel.Nifti2Pair])
def test_a_volume_in_two_files_is_told_for_what_it_is(kind: type[nibabel.Nifti1Pair], tmp_path: Path):
    put(tmp_path, volume(VOLUME))
    made = as_nifti(MASKS, (2, 1, 0), [])
    nibabel.save(kind(np.asarray(made.dataobj), made.affine), tmp_path / "export/m.img")
    data = used(tmp_path)[2]
    assert numbers(data) == [108, 116, 116, 124]
    assert any("voxels lie in another file" in str(fault) for fault in data.exclusions)


def placed_twice(away_px: float, codes: tuple[int, int], *, turned: bool = False) -> nibabel.Nifti1Image:
    """Return a mask of which the qform says that it lies elsewhere, or that it is mirrored."""
    made = as_nifti(MASKS, (2, 1, 0), [])
    other = np.eye(4)
    other[0, 3] = away_px
    if turned:
        other[0, 0], other[0, 3] = -1.0, made.shape[0] - 1
    made.set_sform(made.affine, codes[1])
    made.set_qform(made.affine @ other, codes[0])
    return made


@pytest.mark.parametrize(
    ("made", "fits"),
    [
        (placed_twice(0.0, (1, 1)), True),
        (placed_twice(0.05, (1, 2)), True),
        (placed_twice(3.0, (0, 2)), True),
        (placed_twice(0.2, (1, 2)), False),
        (placed_twice(3.0, (1, 4)), False),
        (placed_twice(0.0, (1, 1), turned=True), False),
    ],
)
def test_a_nifti_file_that_says_of_two_places_that_it_lies_there_is_refused(
    made: nibabel.Nifti1Image, fits: bool, tmp_path: Path
):
    put(tmp_path, volume(VOLUME))
    nibabel.save(made, tmp_path / "export/m.nii.gz")
    _, classes, data = used(tmp_path)
    assert same(classes, MASKS if fits else [])
    assert any("qform and sform" in str(fault) for fault in data.exclusions) != fits


@pytest.mark.parametrize("kind", ["OW", "OB"])
def test_single_bits_in_big_endian_words_mark_where_they_were_drawn(kind: str, tmp_path: Path):
    sources = volume(VOLUME[:, :19, :23])
    made = plain_segmentation(MASKS[:, :19, :23], [item(DerivationImageSequence=[derived(one)]) for one in sources])
    if kind == "OW":
        made.PixelData = np.frombuffer(made.PixelData, "<u2").astype(">u2").tobytes()
    made["PixelData"].VR, made.file_meta.TransferSyntaxUID = kind, ExplicitVRBigEndian
    put(tmp_path, [*sources, made])
    assert same(used(tmp_path)[1], list(MASKS[:, :19, :23]))

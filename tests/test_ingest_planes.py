"""Where pictures lie and on which scale, in objects of one frame and of many, compared with what was written."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
import pytest
from dicom_builders import (
    MASKS,
    VOLUME,
    common,
    derived,
    enhanced,
    image,
    item,
    place,
    plain_segmentation,
    put,
    same,
    save,
    scaled,
    segmentation,
    used,
    volume,
)
from pydicom.dataset import Dataset
from pydicom.uid import (
    generate_uid,
)

from icmoe.data.ingest.geometry import Upright
from icmoe.data.ingest.headers import image_record, read_header
from icmoe.data.ingest.pseudonyms import Pseudonyms

pytestmark = pytest.mark.usefixtures("in_this_process")


def test_a_window_per_slice_does_not_make_equal_tissue_differ_from_slice_to_slice(tmp_path: Path):
    sources = volume(VOLUME)
    for number, source in enumerate(sources):
        source.WindowCenter, source.WindowWidth = [500 + 100 * number, 40], [800, 80]
    put(tmp_path, [*sources, segmentation(sources, MASKS, "BINARY")])
    pictures, classes, _ = used(tmp_path)
    assert same(pictures, scaled(VOLUME, 100.5 - 0.5, 1299.0))
    assert same(classes, MASKS)


def test_a_narrow_window_bounds_the_whole_series_and_one_outside_of_the_data_counts_for_nothing(tmp_path: Path):
    for width, limits in ((80, (0.5, 79.5)), (401.0, (-160.5, 239.5))):
        place = tmp_path / str(width)
        sources = volume(VOLUME, WindowCenter=40, WindowWidth=width, VOILUTFunction="LINEAR_EXACT")
        put(place, [*sources, segmentation(sources, MASKS, "BINARY")])
        assert same(used(place)[0], scaled(VOLUME, max(0, 40 - width / 2), 40 + width / 2)), limits
    sources = volume(VOLUME, WindowCenter=-9000, WindowWidth=100)
    put(tmp_path / "off", [*sources, segmentation(sources, MASKS, "BINARY")])
    assert same(used(tmp_path / "off")[0], scaled(VOLUME))


def test_rescale_of_its_own_in_every_slice_gives_one_scale_for_the_series(tmp_path: Path):
    slopes = 1.0 / np.arange(1, 6)
    sources = volume(VOLUME, Modality="PT")
    for source, slope in zip(sources, slopes, strict=True):
        source.RescaleSlope, source.RescaleIntercept = f"{slope:.8f}", "0"
    put(tmp_path, [*sources, segmentation(sources, MASKS, "BINARY")])
    assert same(used(tmp_path)[0], scaled([grey * slope for grey, slope in zip(VOLUME, slopes, strict=True)]))


TILT = np.deg2rad(20)
PLANES: dict[str, tuple[dict[str, Any], Any]] = {
    "axial": ({}, lambda v: v),
    "head first downwards": ({"step": (0, 0, -5)}, lambda v: v[::-1]),
    "rows to the front": ({"axes": (1, 0, 0, 0, -1, 0), "step": (0, 0, 5)}, lambda v: v[:, ::-1]),
    "columns to the right": ({"axes": (-1, 0, 0, 0, 1, 0), "step": (0, 0, 5)}, lambda v: v[:, :, ::-1]),
    "lying on its side": ({"axes": (0, 1, 0, 1, 0, 0), "step": (0, 0, 5)}, lambda v: v.transpose(0, 2, 1)),
    "coronal": ({"axes": (1, 0, 0, 0, 0, -1), "step": (0, 5, 0)}, lambda v: v),
    "sagittal": ({"axes": (0, 1, 0, 0, 0, -1), "step": (-5, 0, 0)}, lambda v: v[::-1]),
    "oblique": ({"axes": (0.8, 0.6, 0, -0.6, 0.8, 0)}, lambda v: v),
    "steeply oblique": ({"axes": (0.6, 0, 0.8, 0, 1, 0)}, None),
    "gantry tilt": ({"axes": (1, 0, 0, 0, np.cos(TILT), -np.sin(TILT)), "step": (0, 0, 5.0)}, lambda v: v),
}


@pytest.mark.parametrize("name", PLANES)
def test_slices_come_in_the_order_of_the_body_and_upright(name: str, tmp_path: Path):
    geometry, turned = PLANES[name]
    sources = volume(VOLUME, **geometry)
    put(tmp_path, [*sources, segmentation(sources, MASKS, "BINARY", omit_empty_frames=False)])
    pictures, classes, data = used(tmp_path)
    greys = turned(VOLUME) if turned else VOLUME[::-1] if np.cross([0.6, 0, 0.8], [0, 1, 0])[0] < 0 else VOLUME
    assert same(pictures, scaled(greys))
    assert same(classes, turned(MASKS) if turned else MASKS[::-1])
    distance = 5.0 * np.cos(TILT) if name == "gantry tilt" else 5.0
    assert data.slices[0].spacing_mm == pytest.approx((distance, 1.5, 1.0) if "side" in name else (distance, 1.0, 1.5))


def test_enhanced_frames_in_any_order_with_a_scale_of_their_own(tmp_path: Path):
    order = [3, 0, 4, 1, 2]
    frames = [
        place(
            (-20, -30, 5.0 * n),
            stack=n + 1,
            PixelValueTransformationSequence=item(RescaleSlope=f"{n + 1}", RescaleIntercept="-7", RescaleType="US"),
            FrameVOILUTSequence=item(WindowCenter=1000, WindowWidth=4000 + 100 * n, WindowCenterWidthExplanation=""),
            PixelMeasuresSequence=item(PixelSpacing=[1.0, 1.5], SliceThickness=5.0),
        )
        for n in order
    ]
    source = enhanced(VOLUME[order], frames, common(spacing=(9.0, 9.0)))
    groups = [item(DerivationImageSequence=[derived(source, at + 1)]) for at in range(5)]
    put(tmp_path, [source, plain_segmentation(MASKS[order], groups)])
    pictures, classes, data = used(tmp_path)
    assert same(
        pictures, scaled([grey * (n + 1.0) - 7 for n, grey in enumerate(VOLUME)], 1000 - 0.5 - 4399 / 2, 1000 - 0.5 + 4399 / 2)
    )
    assert same(classes, MASKS)
    assert data.slices[0].spacing_mm == pytest.approx((5.0, 1.0, 1.5))


def test_phases_of_a_cine_are_ordered_by_place_and_then_by_time(tmp_path: Path):
    where, when = [0, 0, 5, 5], [2, 1, 2, 1]
    frames = [place((0, 0, z), stack=1 + z // 5, time=t) for z, t in zip(where, when, strict=True)]
    source = enhanced(VOLUME[:4], frames, common())
    groups = [item(DerivationImageSequence=[derived(source, n + 1)]) for n in range(4)]
    put(tmp_path, [source, plain_segmentation(MASKS[:4], groups)])
    pictures, classes, data = used(tmp_path)
    order = [1, 0, 3, 2]
    assert same(pictures, scaled(VOLUME[order]))
    assert same(classes, MASKS[order])
    assert all(one.spacing_mm is None for one in data.slices), "the distance of phases is not one of slices"


def test_legacy_converted_objects_read_like_what_they_were_made_from(tmp_path: Path):
    kind = "1.2.840.10008.5.1.4.1.1.4"
    sources = volume(
        VOLUME,
        SOPClassUID=kind,
        ImageType=["ORIGINAL", "PRIMARY", "M"],
        RescaleSlope="2",
        RescaleIntercept="1",
        BodyPartExamined="",
        SliceThickness=5.0,
    )
    made = hd.legacy.LegacyConvertedEnhancedMRImage(
        sources, series_instance_uid=generate_uid(), series_number=2, sop_instance_uid=generate_uid(), instance_number=1
    )
    heights = [own.PlanePositionSequence[0].ImagePositionPatient[2] for own in made.PerFrameFunctionalGroupsSequence]
    put(tmp_path, [made, segmentation([made], MASKS[np.argsort(np.argsort(heights))], "BINARY")])
    pictures, classes, _ = used(tmp_path)
    assert same(pictures, scaled(VOLUME))
    assert same(classes, MASKS)


@pytest.mark.parametrize("turn", [Upright(*flags) for flags in itertools.product((False, True), repeat=3)])
def test_a_picture_turned_upright_comes_back_as_it_was(turn: Upright):
    picture = np.arange(12).reshape(3, 4)
    assert np.array_equal(turn.turned_back(turn.turn(picture)), picture)


@pytest.mark.parametrize("distance_mm", [4.0, -4.0])
def test_slices_of_nuclear_medicine_lie_where_the_detector_and_the_slice_vector_say(distance_mm: float, tmp_path: Path):
    detector = item(ImagePositionPatient=[-20.0, -30.0, 40.0], ImageOrientationPatient=[1, 0, 0, 0, 1, 0])
    data = image(
        VOLUME,
        Modality="NM",
        SOPClassUID="1.2.840.10008.5.1.4.1.1.20",
        ImageType=["ORIGINAL", "PRIMARY", "RECON TOMO", "EMISSION"],
        PixelSpacing=[1.0, 1.5],
        SpacingBetweenSlices=distance_mm,
        SliceVector=[1, 2, 3, 2, 1],  # two passes over the same places
        DetectorInformationSequence=[detector],
    )
    record = image_record(read_header(save(data, tmp_path / "x")), Pseudonyms(bytes(32)))
    planes = [frame.plane for frame in record.frames]
    assert [plane and plane[:3] for plane in planes] == [(-20.0, -30.0, 40.0 + distance_mm * n) for n in (0, 1, 2, 1, 0)]
    assert {plane and plane[3:] for plane in planes} == {(1, 0, 0, 0, 1, 0, 1.0, 1.5)}


@pytest.mark.parametrize("without", ["SliceVector", "SpacingBetweenSlices", "DetectorInformationSequence", "ImageType"])
def test_views_of_nuclear_medicine_that_are_no_stack_have_no_place(without: str, tmp_path: Path):
    given = {
        "ImageType": ["ORIGINAL", "PRIMARY", "RECON TOMO"],
        "SpacingBetweenSlices": 4.0,
        "SliceVector": [1, 2, 3, 4, 5],
        "DetectorInformationSequence": [item(ImagePositionPatient=[0, 0, 0], ImageOrientationPatient=[1, 0, 0, 0, 1, 0])],
    }
    data = image(VOLUME, Modality="NM", PixelSpacing=[1.0, 1.0], **{k: v for k, v in given.items() if k != without})
    record = image_record(read_header(save(data, tmp_path / "x")), Pseudonyms(bytes(32)))
    assert {frame.plane for frame in record.frames} == {None}


def test_sides_of_pixels_in_a_ratio_without_distances_change_no_pixel_and_make_up_no_millimetre(tmp_path: Path):
    found = {}
    for name in ("known", "ratio"):
        sources = volume(VOLUME, PixelSpacing=[2.0, 1.0])
        mask = segmentation(sources, MASKS, "BINARY")
        for source in sources if name == "ratio" else []:
            del source.PixelSpacing
            source.PixelAspectRatio = [2, 1]
        put(tmp_path / name, [*sources, mask])
        found[name] = used(tmp_path / name)
    assert same(found["ratio"][0], found["known"][0])
    assert same(found["ratio"][1], MASKS)
    assert {one.spacing_mm for one in found["known"][2].slices} == {(5.0, 2.0, 1.0)}
    assert {one.spacing_mm for one in found["ratio"][2].slices} == {None}


@pytest.mark.parametrize("said", ["offset", "number"])
def test_parts_of_a_whole_without_planes_follow_each_other(said: str, tmp_path: Path):
    bounds, series = ((0, 2), (2, 3), (3, 5)), {"SeriesInstanceUID": generate_uid(), "StudyInstanceUID": generate_uid()}
    parts = []
    for number, (start, end) in enumerate(bounds):
        where = {"ConcatenationFrameOffsetNumber": start} if said == "offset" else {"InstanceNumber": number + 1}
        content = [item(FrameContentSequence=[item(FrameAcquisitionNumber=1)]) for _ in range(start, end)]
        parts.append(enhanced(VOLUME[start:end], content, Dataset(), **{**series, **where}))
    places = [item(DerivationImageSequence=[derived(part, frame + 1)]) for part in parts for frame in range(part.NumberOfFrames)]
    made = plain_segmentation(MASKS, places, SharedFunctionalGroupsSequence=[Dataset()])
    put(tmp_path, [*parts, made])
    pictures, classes, _ = used(tmp_path)
    assert same(pictures, scaled(VOLUME))
    assert same(classes, MASKS)

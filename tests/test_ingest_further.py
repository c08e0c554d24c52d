"""Exports of further programs: whose mask it is, and on which images it says what."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
from dicom_builders import (
    MASKS,
    VOLUME,
    common,
    contour,
    derived,
    image,
    item,
    lying,
    numbers,
    plain_segmentation,
    put,
    same,
    save,
    scaled,
    segmentation,
    structures,
    used,
    volume,
)
from exports import BACKGROUND, read_frames
from pydicom.uid import generate_uid
from test_ingest_masks import as_nifti, square

from icmoe.study import Label

pytestmark = pytest.mark.usefixtures("in_this_process")
ANOTHER = np.random.default_rng(7).integers(0, 3000, VOLUME.shape).astype(np.uint16)
BOX = (2.4, 3.4, 12.6, 15.6)
FILLED = np.zeros((20, 24), np.uint8)
FILLED[3:13, 4:16] = 1
LIVER = (BACKGROUND, Label(name="liver", values=(1,)))


def nifti(place: Path, name: str, voxels: np.ndarray) -> None:
    path = place / "export" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(as_nifti(voxels, (2, 1, 0), [], voxels.dtype), path)


@pytest.mark.parametrize("differ", ["slopes", "depths"])
def test_inverted_slices_of_several_scales_stay_comparable(differ: str, tmp_path: Path):
    sources = volume(VOLUME, PhotometricInterpretation="MONOCHROME1")
    slopes = [1.0, 2.0, 0.5, 1.5, 3.0] if differ == "slopes" else [1.0] * 5
    for source, slope, bits in zip(sources, slopes, [12, 13, 14, 15, 16], strict=True):
        source.RescaleSlope, source.RescaleIntercept = slope, 0.0
        if differ == "depths":
            source.BitsStored, source.HighBit = bits, bits - 1
    put(tmp_path, [*sources, segmentation(sources, MASKS, "BINARY")])
    want = [-slope * grey.astype(np.float64) for slope, grey in zip(slopes, VOLUME, strict=True)]
    assert same(used(tmp_path)[0], scaled(want))


def test_a_second_file_of_an_inverted_instance_is_its_copy(tmp_path: Path):
    sources = volume(VOLUME, PhotometricInterpretation="MONOCHROME1")
    for number, source in enumerate(sources):
        source.RescaleSlope, source.RescaleIntercept = 1.0 + number, 0.0
    put(tmp_path, [*sources, segmentation(sources, MASKS, "BINARY")])
    for source in sources:
        source.InstitutionName = "Elm"
    put(tmp_path, sources, "again/{}")
    assert same(used(tmp_path)[1], MASKS)


@pytest.mark.parametrize(
    ("one", "other"), [("Yamada^Tarou=山田^太郎=やまだ^たろう", "Yamada^Tarou"), ("=山田^太郎", "=山田^太郎=やまだ")]
)
def test_other_ways_of_writing_a_name_make_no_second_patient(one: str, other: str, tmp_path: Path):
    for name, pixels in ((one, VOLUME), (other, ANOTHER)):
        sources = volume(pixels, PatientID="", PatientName=name, PatientBirthDate="19500101", SpecificCharacterSet="ISO_IR 192")
        put(tmp_path, [*sources, segmentation(sources, MASKS, "BINARY")], f"{generate_uid()}/{{}}")
    data = used(tmp_path)[2]
    assert len(data.slices) == 10
    assert len({one.patient for one in data.slices}) == 1


def test_brightness_and_colour_differences_of_16_bits_are_read_by_brightness(tmp_path: Path):
    pixels = np.stack([VOLUME[0], VOLUME[1], VOLUME[2]], axis=-1)
    data = image(VOLUME[0], SamplesPerPixel=3, PlanarConfiguration=0, PhotometricInterpretation="YBR_FULL")
    data.PixelData = pixels.tobytes()
    ((_, found),) = read_frames(save(data, tmp_path / "x"), [0])
    assert same([found], [VOLUME[0]])


@pytest.mark.parametrize(
    ("names", "mask"),
    [
        (("imagesTr/patient001_frame01_0000", "imagesTr/patient001_frame12_0000"), "labelsTr/{}"),
        (("patient001_frame01", "patient001_frame12"), "{}_gt"),
        (("x/A0S9V9_sa_ED", "x/A0S9V9_sa_ES"), "{}_gt"),
        (("img/p7_visit1", "img/p7_visit2"), "masks/{}"),
        (("img/p7_20200131", "img/p7_2021-07-01"), "masks/{}"),
    ],
)
def test_frames_and_visits_of_a_patient_are_one_patient(names: tuple[str, str], mask: str, tmp_path: Path):
    for name, voxels in zip(names, (VOLUME, ANOTHER), strict=True):
        nifti(tmp_path, f"{name}.nii.gz", voxels)
        stem = name.removesuffix("_0000")
        nifti(tmp_path, mask.format(stem if "{}_" in mask else stem.rpartition("/")[2]) + ".nii.gz", MASKS)
    _, masks, data = used(tmp_path)
    assert len(masks) == 10
    assert len({one.patient for one in data.slices}) == 1


@pytest.mark.parametrize("sequence", ["t2w", "adc", "hbv"])
def test_sequences_of_the_prostate_find_the_mask_of_their_case(sequence: str, tmp_path: Path):
    """As PI-CAI names them: a folder per patient with images, and one for all masks."""
    for case, voxels in (("10000_1000000", VOLUME), ("10001_1000001", ANOTHER)):
        nifti(tmp_path, f"images/{case[:5]}/{case}_{sequence}.nii.gz", voxels)
        nifti(tmp_path, f"labels/{case}.nii.gz", MASKS)
    _, masks, data = used(tmp_path)
    assert same(masks, [*MASKS, *MASKS])
    assert len({one.patient for one in data.slices}) == 2


def test_one_mask_beside_sequences_that_lie_on_its_grid_marks_all(tmp_path: Path):
    for name, voxels in (("t1", VOLUME), ("flair", ANOTHER)):
        nifti(tmp_path, f"P1/{name}.nii.gz", voxels)
    nifti(tmp_path, "P1/tumor.nii.gz", MASKS)
    _, masks, data = used(tmp_path)
    assert same(masks, [*MASKS, *MASKS])
    assert not numbers(data)


def test_one_mask_beside_volumes_that_are_no_sequences_marks_none(tmp_path: Path):
    for name, voxels in (("before", VOLUME), ("after", ANOTHER)):
        nifti(tmp_path, f"P1/{name}.nii.gz", voxels)
    nifti(tmp_path, "P1/tumor.nii.gz", MASKS)
    assert 122 in numbers(used(tmp_path)[2])


@pytest.mark.parametrize("found", [True, False])
def test_organs_that_the_study_does_not_name_are_left_out_for_that(found: bool, tmp_path: Path):
    """As TotalSegmentator writes them, a file for each organ, empty where it is not in the picture."""
    nifti(tmp_path, "s1/ct.nii.gz", VOLUME.astype(np.int16))
    nifti(tmp_path, "s1/segmentations/liver.nii.gz", MASKS * np.uint8(found))
    for place, organ in enumerate(("spleen", "kidney_left", "aorta"), start=1):
        nifti(tmp_path, f"s1/segmentations/{organ}.nii.gz", np.roll(MASKS, 4 * place, axis=2))
    _, masks, data = used(tmp_path, LIVER)
    assert same(masks, MASKS * np.uint8(found))
    assert [number for number in numbers(data) if number != 124] == [120] * 3


@pytest.mark.parametrize("folder", ["s1/segmentations", "segmentations"])
def test_the_only_organ_that_is_there_is_not_what_the_study_calls_one(folder: str, tmp_path: Path):
    put(tmp_path, volume(VOLUME), "s1/ct/{}")
    for organ in ("spleen", "kidney_left", "aorta"):
        nifti(tmp_path, f"{folder}/{organ}.nii.gz", MASKS * np.uint8(organ == "aorta"))
    data = used(tmp_path, LIVER)[2]
    assert not data.slices
    assert numbers(data) == [108, 120, 120, 120, 124]


def test_a_second_reading_of_an_organ_is_no_other_organ(tmp_path: Path):
    put(tmp_path, volume(VOLUME))
    nifti(tmp_path, "liver.nii.gz", MASKS)
    nifti(tmp_path, "liver_reader2.nii.gz", np.roll(MASKS, 1, axis=2))
    data = used(tmp_path, LIVER)[2]
    assert not data.slices
    assert 122 in numbers(data)


@pytest.mark.parametrize("folder", ["dicom/P2/{}", "dicom/a{}"])
def test_a_mask_with_the_number_of_an_absent_patient_is_nobodys(folder: str, tmp_path: Path):
    put(tmp_path, volume(VOLUME, PatientID="P2" if folder == "dicom/a{}" else "ANON"), folder)
    nifti(tmp_path, "masks/P1.nii.gz", MASKS)
    data = used(tmp_path)[2]
    assert not data.slices
    assert 121 in numbers(data)
    (tmp_path / "export/masks/P1.nii.gz").rename(tmp_path / "export/masks/P2.nii.gz")
    assert same(used(tmp_path)[1], MASKS)


@pytest.mark.parametrize("name", ["tumor.nii.gz", "lesion_1.nii.gz", "20200131.nii.gz", "P12.nii.gz"])
def test_a_mask_of_another_kind_of_name_is_that_of_the_only_patient(name: str, tmp_path: Path):
    put(tmp_path, volume(VOLUME, PatientID="12345678"), "dicom/P2/{}")
    nifti(tmp_path, f"masks/{name}", MASKS)
    assert same(used(tmp_path)[1], MASKS)


@pytest.mark.parametrize("space", ["one", "two"])
def test_a_segmentation_that_lists_ct_and_pet_is_of_the_one_on_whose_grid_it_lies(space: str, tmp_path: Path):
    ct = volume(VOLUME)
    shared = {name: ct[0][name].value for name in ("FrameOfReferenceUID", "StudyInstanceUID")}
    further = shared | ({"FrameOfReferenceUID": generate_uid()} if space == "two" else {})
    pet = volume(VOLUME[:, ::2, ::2], spacing=(2.3, 3.1), Modality="PT", **further)
    groups = [lying(ct[n].ImagePositionPatient) for n in (1, 2, 3)]
    listed = [
        item(
            SeriesInstanceUID=series[0].SeriesInstanceUID,
            ReferencedInstanceSequence=[item(ReferencedSOPInstanceUID=one.SOPInstanceUID) for one in series],
        )
        for series in (ct, pet)
    ]
    made = plain_segmentation(
        MASKS[1:4], groups, SharedFunctionalGroupsSequence=[common()], ReferencedSeriesSequence=listed, **shared
    )
    put(tmp_path, [*ct, *pet, made])
    _, masks, data = used(tmp_path)
    assert same(masks, MASKS)
    assert numbers(data) == [124]


def test_contours_without_an_image_are_of_the_phase_that_others_name(tmp_path: Path):
    sources = volume(VOLUME)
    shared = {name: sources[0][name].value for name in ("FrameOfReferenceUID", "StudyInstanceUID")}
    other = volume(ANOTHER, **shared)
    contours = [contour(square(sources[n], *BOX), sources[n] if n != 2 else None) for n in (1, 2, 3)]
    put(tmp_path, [*sources, *other, structures(contours, listed=[*sources, *other], space=sources[0].FrameOfReferenceUID)])
    pictures, masks, _ = used(tmp_path)
    empty = np.zeros_like(FILLED)
    assert same(masks, [empty, FILLED, FILLED, FILLED, empty])
    assert same(pictures, scaled(VOLUME))


@pytest.mark.parametrize("form", ["seg", "contours"])
@pytest.mark.parametrize("drawn", [(0, 2, 4), (0, 1, 4), (1, 3)])
def test_slices_between_those_that_were_drawn_on_are_no_background(form: str, drawn: tuple[int, ...], tmp_path: Path):
    sources = volume(VOLUME)
    if form == "contours":
        made = structures(
            [contour(square(sources[n], *BOX), sources[n]) for n in drawn], listed=sources, space=sources[0].FrameOfReferenceUID
        )
    else:
        groups = [lying(sources[n].ImagePositionPatient) for n in drawn]
        for group, n in zip(groups, drawn, strict=True):
            group.DerivationImageSequence = [derived(sources[n])]
        references = [item(ReferencedSOPInstanceUID=one.SOPInstanceUID) for one in sources]
        made = plain_segmentation(
            np.stack([FILLED] * len(drawn)),
            groups,
            SharedFunctionalGroupsSequence=[common()],
            ReferencedSeriesSequence=[item(ReferencedInstanceSequence=references)],
            FrameOfReferenceUID=sources[0].FrameOfReferenceUID,
        )
    put(tmp_path, [*sources, made])
    _, masks, data = used(tmp_path)
    outside = [n for n in range(5) if n in drawn or drawn != (0, 2, 4)]
    assert same(masks, [FILLED if n in drawn else np.zeros_like(FILLED) for n in outside])
    assert numbers(data) == [124] * (drawn == (0, 2, 4))

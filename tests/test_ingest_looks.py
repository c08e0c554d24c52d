"""A mask of one visit, frame, side or sequence of a patient is not another one's; and masks of which a part is of use."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from dicom_builders import MASKS, VOLUME, contour, numbers, put, same, segmentation, structures, used, volume
from test_ingest_further import ANOTHER, BOX, FILLED, nifti
from test_ingest_masks import square
from test_names_of_masks import picture

pytestmark = pytest.mark.usefixtures("in_this_process")
GREYS = np.random.default_rng(4).integers(0, 4000, (4, 20, 24)).astype(np.uint16)


def require_refused(place: Path, number: int) -> None:
    data = used(place)[2]
    assert not data.slices
    assert number in numbers(data)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("P1/visit1/images/{}", "P1/visit2/masks/{}"),
        ("P1/2020-01-02/{}", "P1/2021-01-02/{}_mask"),
        ("P1/ses-pre/{}", "P1/ses-post/{}_mask"),
        ("P1/baseline/{}", "P1/followup/{}_mask"),
        ("P1/t1/{}", "P1/flair/{}_mask"),
        ("P1/03-23-2003-NA-PETCT-7/{}", "P1/05-02-2004-NA-PETCT-8/{}_mask"),
        ("P1/20200101_CT/{}", "P1/20210101_CT/{}_mask"),
        ("P1/pre/{}", "P1/post/{}_mask"),
        ("P1/tp1/{}", "P1/tp2/{}_mask"),
        ("P1_20200101/{}", "P1_20210101/{}_mask"),
        ("P1_visit1/{}", "P1_visit2/{}_mask"),
    ],
)
def test_a_picture_of_marks_is_not_another_visits(one: str, other: str, tmp_path: Path):
    for number in (1, 2):
        picture(tmp_path, one.format(number) + ".png", GREYS[number])
    picture(tmp_path, other.format(1) + ".png", FILLED)
    require_refused(tmp_path, 121)
    same_visit = one.replace("images", "masks") if "masks" in other else one + "_mask"
    picture(tmp_path, same_visit.format(1) + ".png", FILLED)
    assert same(used(tmp_path)[1], [FILLED])


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("P1/ses-1/t1", "P1/ses-2/t1_mask"),
        ("img/p7_visit1", "masks/p7_visit2"),
        ("patient001/patient001_frame01", "patient001/patient001_frame12_gt"),
        ("P1/P1_t1", "P1/P1_flair_lesion"),
        ("P1/knee_left", "P1/knee_right_seg"),
        ("P1/a_1", "P1/a_2_seg"),
        ("P1/03-23-2003-NA-PETCT-7/ct", "P1/05-02-2004-NA-PETCT-8/ct_seg"),
        ("P1/20200101_CT/a", "P1/20210101_CT/a_seg"),
        ("P1/pre/a", "P1/post/a_seg"),
        ("P1_tp1", "P1_tp2_seg"),
        ("P1_2020-01-01/a", "P1_2021-01-01/a_seg"),
    ],
)
def test_a_volume_of_marks_is_not_another_visits(image: str, mask: str, tmp_path: Path):
    nifti(tmp_path, f"{image}.nii.gz", VOLUME.astype(np.int16))
    nifti(tmp_path, f"{mask}.nii.gz", MASKS)
    require_refused(tmp_path, 121)


@pytest.mark.parametrize("mask", ["P1/visit2/tumor.nii.gz", "P1/s2.nii.gz"])
def test_a_volume_of_marks_is_not_of_a_series_of_another_visit(mask: str, tmp_path: Path):
    put(tmp_path, volume(VOLUME, PatientID="P1"), "P1/visit1/s1/{}")
    nifti(tmp_path, mask, MASKS)
    require_refused(tmp_path, 121)


@pytest.mark.parametrize("mask", ["masks_20220131/P1.nii.gz", "P1/2019-03-04/tumor.nii.gz", "P1/masks/right_lesion.nii.gz"])
def test_when_a_mask_was_drawn_and_where_its_object_lies_is_no_visit(mask: str, tmp_path: Path):
    put(tmp_path, volume(VOLUME, PatientID="P1"), "P1/20190304/{}")
    nifti(tmp_path, mask, MASKS)
    assert same(used(tmp_path)[1], MASKS)


@pytest.mark.parametrize("mask", ["scan1_lesion", "scan1 tumor"])
def test_a_mask_may_be_called_like_its_volume_and_what_it_marks(mask: str, tmp_path: Path):
    for name, voxels in (("scan1", VOLUME), ("scan2", ANOTHER), ("scan", ANOTHER + 1)):
        nifti(tmp_path, f"{name}.nii.gz", voxels)
    nifti(tmp_path, f"{mask}.nii.gz", MASKS)
    _, masks, data = used(tmp_path)
    assert same(masks, MASKS)
    assert numbers(data) == [124, 124]
    (tmp_path / "export/scan1.nii.gz").unlink()
    require_refused(tmp_path, 122)


@pytest.mark.parametrize("form", ["seg", "volume"])
def test_a_mask_with_values_that_mean_no_class_spoils_no_image_that_has_another(form: str, tmp_path: Path):
    sources = volume(VOLUME)
    put(tmp_path, [*sources, *([segmentation(sources, MASKS, "BINARY")] if form == "seg" else [])])
    if form == "volume":
        nifti(tmp_path, "lesion.nii.gz", MASKS)
    nifti(tmp_path, "parcels.nii.gz", np.roll(MASKS, 5, axis=2) * np.uint8(7))
    _, masks, data = used(tmp_path)
    assert same(masks, MASKS)
    assert numbers(data) == [106]


def test_contours_on_images_that_are_not_there_make_no_background_of_others(tmp_path: Path):
    sources, absent = volume(VOLUME), volume(VOLUME)
    contours = [contour(square(sources[n], *BOX), absent[n]) for n in (1, 2)]
    put(tmp_path, [*sources, structures(contours, listed=sources, space=sources[0].FrameOfReferenceUID)])
    require_refused(tmp_path, 123)


def test_a_contour_across_the_slices_makes_no_background_of_them(tmp_path: Path):
    sources = volume(VOLUME)
    upright = contour(np.asarray([[-10.0, -20.0, 40.0], [-10.0, -10.0, 50.0], [-10.0, -20.0, 60.0]]))
    put(tmp_path, [*sources, structures([upright], listed=sources, space=sources[0].FrameOfReferenceUID)])
    require_refused(tmp_path, 121)


@pytest.mark.parametrize(
    "visits",
    [
        ("jo/visit1", "jo/visit2", "jo/2019-01-02", "jo/session_3"),
        ("jo/03-23-2003-NA-PETCT-79071", "jo/05-02-2004-NA-PETCT-79072", "jo/20200101_CT", "jo/20210101_MR_T1"),
        ("jo/pre", "jo/post", "jo/tp1", "jo/tp2"),
        ("jo1_20200101", "jo1_2021-01-01", "jo1_visit2", "jo1_tp3"),
    ],
)
def test_visits_of_one_patient_stay_in_one_split(visits: tuple[str, ...], tmp_path: Path):
    for seed, visit in enumerate(visits):
        picture(tmp_path, f"{visit}/1.png", GREYS[seed])
        picture(tmp_path, f"{visit}/1_mask.png", FILLED)
    data = used(tmp_path)[2]
    assert (len(data.slices), len({item.patient for item in data.slices})) == (4, 1)


def test_folders_that_say_only_when_are_a_patient_each_where_nothing_else_names_one(tmp_path: Path):
    for seed, folder in enumerate(("case_20200101", "case_20200202")):
        picture(tmp_path, f"{folder}/1.png", GREYS[seed])
        picture(tmp_path, f"{folder}/1_mask.png", FILLED)
    data = used(tmp_path)[2]
    assert (len(data.slices), len({item.patient for item in data.slices})) == (2, 2)

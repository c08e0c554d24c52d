"""What people call pictures and their masks: whose mask it is must not hang on one way of naming."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
from dicom_builders import MASKS, VOLUME, numbers, put, same, scaled, used, volume
from exports import BACKGROUND
from PIL import Image
from test_ingest_masks import as_nifti

from icmoe.study import Label

pytestmark = pytest.mark.usefixtures("in_this_process")
MARKED, APART, ACROSS = (np.zeros((24, 32), np.uint8) for _ in range(3))
MARKED[4:9, 5:11], APART[15:20, 5:11], ACROSS[7:12, 5:11] = 1, 1, 1
CLASSES = (BACKGROUND, Label(name="lesion", values=(1, 255)), Label(name="edema", values=(2,)))
GREYS = np.random.default_rng(4).integers(0, 4000, (3, 24, 32)).astype(np.uint16)


def picture(place: Path, name: str, pixels: np.ndarray) -> None:
    path = place / "export" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.mark.parametrize("names", ["a_mask.png a_mask_1.png", "a_mask1.png a_mask2.png", "a-mask.png A-MASK-2.PNG"])
def test_masks_of_one_picture_may_be_counted(names: str, tmp_path: Path):
    """As in BUSI, where a second lesion of a picture has a mask of its own."""
    picture(tmp_path, "a.png", GREYS[0])
    for name, mask in zip(names.split(), (MARKED, APART), strict=True):
        picture(tmp_path, name, mask)
    _, masks, data = used(tmp_path)
    assert same(masks, [MARKED | APART])
    assert not numbers(data)
    picture(tmp_path, names.split()[1], ACROSS)
    picture(tmp_path, "b.png", GREYS[1])
    picture(tmp_path, "b_mask.png", MARKED)
    _, masks, data = used(tmp_path)
    assert same(masks, [MARKED]), "two readings of one lesion cost their own picture"
    assert numbers(data) == [122]


@pytest.mark.parametrize("channels", [1, 2])
def test_pictures_of_nnunet_share_the_mask_of_their_case(channels: int, tmp_path: Path):
    for channel in range(channels):
        picture(tmp_path, f"imagesTr/case_7_{channel:04}.png", GREYS[channel])
    picture(tmp_path, "labelsTr/case_7.png", MARKED)
    pictures, masks, data = used(tmp_path)
    assert same(pictures, scaled(GREYS[:channels]))
    assert same(masks, [MARKED] * channels)
    assert not numbers(data)


@pytest.mark.parametrize("mask", ["masks/case_mask.png", "labelsTr/case.png"])
def test_numbered_slices_are_no_channels_of_a_case(mask: str, tmp_path: Path):
    for number in range(1, 4):
        picture(tmp_path, f"imagesTr/case_{number:04}.png", GREYS[number - 1])
    picture(tmp_path, mask, MARKED)
    data = used(tmp_path)[2]
    assert not data.slices
    assert 123 in numbers(data)


@pytest.mark.parametrize("name", ["{}.dcm.png", "{}.dcm_mask.png", "{}_seg.dcm.PNG"])
def test_the_ending_of_the_image_may_stay_in_the_name_of_its_mask(name: str, tmp_path: Path):
    put(tmp_path, volume(VOLUME[1:4]), "IM{}.dcm")
    for number, mask in enumerate(MASKS[1:4]):
        picture(tmp_path, name.format(f"IM{3 - number}"), mask)
    assert same(used(tmp_path)[1], MASKS[1:4])


@pytest.mark.parametrize("name", ["masks/a.png", "labelsTr/a.png", "a_mask.png", "a-seg.PNG", "ground/a_GT.png"])
def test_a_mask_with_soft_edges_is_refused_for_its_values_and_is_no_image(name: str, tmp_path: Path):
    """A program that drew or shrank it smoothed its edges, so that it has as many values as a picture."""
    picture(tmp_path, "images/a.png" if "/" in name else "a.png", GREYS[0])
    down, across = np.mgrid[:24, :32]
    picture(tmp_path, name, np.clip(255 - 20 * np.hypot(down - 12, across - 16), 0, 255).astype(np.uint8))
    data = used(tmp_path)[2]
    assert data.images_found == 1
    assert numbers(data) == [106, 108]


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("image_{}.png", "mask_{}.png"),
        ("{}_img.png", "{}_mask.png"),
        ("images/IMG{}.png", "masks/GT{}.png"),
        ("slice-{}.png", "label-{}.png"),
    ],
)
def test_pictures_and_masks_may_be_called_what_they_are(image: str, mask: str, tmp_path: Path):
    for number in range(3):
        picture(tmp_path, image.format(number), GREYS[number])
        picture(tmp_path, mask.format(number), np.roll(MARKED, number, 1))
    pictures, masks, data = used(tmp_path)
    assert same(pictures, scaled(GREYS))
    assert same(masks, [np.roll(MARKED, number, 1) for number in range(3)])
    assert not numbers(data)


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("volume-{}.nii", "segmentation-{}.nii"),
        ("img/img000{}.nii.gz", "label/label000{}.nii.gz"),
        ("p{}_image.nii.gz", "p{}_mask.nii.gz"),
        ("scans/p{}/scan.nii", "masks/p{}.nii"),
    ],
)
def test_volumes_and_masks_may_be_called_what_they_are(image: str, mask: str, tmp_path: Path):
    """As in LiTS and BTCV; the volumes lie on one grid."""
    for number in range(3):
        shown, marked = VOLUME + 9 * number * np.arange(24, dtype=np.uint16), np.roll(MASKS, number, 2)
        for name, voxels in ((image, shown), (mask, marked)):
            path = tmp_path / "export" / name.format(number)
            path.parent.mkdir(parents=True, exist_ok=True)
            nibabel.save(as_nifti(voxels, (2, 1, 0), [], voxels.dtype), path)
    _, masks, data = used(tmp_path)
    assert sorted(map(bytes, masks)) == sorted(bytes(np.roll(MASKS, number, 2)[at]) for number in range(3) for at in range(5))
    assert len({part.patient for part in data.slices}) == 3
    assert not numbers(data)


@pytest.mark.parametrize("mask", ["masks/{}.nii.gz", "{}_seg.nii"])
def test_a_volume_that_is_called_like_the_folder_of_a_series_is_its_mask(mask: str, tmp_path: Path):
    """The folders have other names than the patients, whose series lie on one grid."""
    for number in range(3):
        put(
            tmp_path,
            volume(VOLUME + 9 * number * np.arange(24, dtype=np.uint16), PatientID=f"Doe {number}"),
            f"ct/P0{number}/{{}}",
        )
        path = tmp_path / "export" / mask.format(f"p0{number}")
        path.parent.mkdir(exist_ok=True)
        nibabel.save(as_nifti(np.roll(MASKS, number, 2), (2, 1, 0), []), path)
    _, masks, data = used(tmp_path)
    assert sorted(map(bytes, masks)) == sorted(bytes(np.roll(MASKS, number, 2)[at]) for number in range(3) for at in range(5))
    assert not numbers(data)


@pytest.mark.parametrize("patient", ["P0{}", "Doe {}"])
def test_a_volume_that_is_called_like_no_image_beside_others_that_are_is_nobodys(patient: str, tmp_path: Path):
    """Its own images are missing; those of another patient lie on the same grid."""
    for number in range(3):
        shown = volume(VOLUME + 9 * number * np.arange(24, dtype=np.uint16), PatientID=patient.format(number))
        put(tmp_path, shown if number else [], f"ct/P0{number}/{{}}")
        (tmp_path / "export/masks").mkdir(parents=True, exist_ok=True)
        nibabel.save(as_nifti(np.roll(MASKS, number, 2), (2, 1, 0), []), tmp_path / f"export/masks/P0{number}.nii.gz")
    _, masks, data = used(tmp_path)
    assert sorted(map(bytes, masks)) == sorted(bytes(np.roll(MASKS, number, 2)[at]) for number in (1, 2) for at in range(5))
    assert numbers(data) == [121]
    for number in range(5):
        (tmp_path / f"export/ct/P02/{number + 1}").unlink()
    assert same(used(tmp_path)[1], np.roll(MASKS, 1, 2)), "one patient alone"


def named(place: Path, name: str, marks: np.ndarray) -> None:
    """Write three slices as a volume, or the middle one as a picture with marks of 255."""
    if name.endswith(".png"):
        return picture(place, name, marks[1] * (255 if marks.dtype == np.uint8 else 1))
    path = place / "export" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return nibabel.save(as_nifti(marks, (2, 1, 0), [], marks.dtype), path)


ONE = np.stack([np.zeros_like(MARKED), MARKED, APART])
OTHER = np.roll(ONE, 14, axis=2)
BY_CLASS = ["case1_{}", "case1-{}", "{}/case1", "masks/{}/case1", "{}/masks/case1", "masks/P1/{}/case1", "masks/{}/P1/case1"]


@pytest.mark.parametrize("ending", [".nii.gz", ".png"])
@pytest.mark.parametrize("form", BY_CLASS)
def test_a_mask_of_one_thing_means_the_class_at_the_end_of_its_name_or_of_its_folder(form: str, ending: str, tmp_path: Path):
    """1 in a file for each class is not what the study calls 1, also where a case has but one of them."""
    named(tmp_path, f"{'images/P1/' * ('P1' in form)}case1{ending}", GREYS)
    named(tmp_path, form.format("edema") + ending, ONE)
    kept = slice(1, 2) if ending == ".png" else slice(None)
    assert same(used(tmp_path, CLASSES)[1], (2 * ONE)[kept])
    named(tmp_path, form.format("lesion") + ending, OTHER)
    assert same(used(tmp_path, CLASSES)[1], np.maximum(2 * ONE, OTHER)[kept])


@pytest.mark.parametrize("ending", [".nii.gz", ".png"])
@pytest.mark.parametrize("both", ["{}/edema/case1", "edema/{}/case1", "{}/case1_edema", "{}/edema/P1/case1", "{}Tr/case1_edema"])
def test_a_name_that_the_image_has_too_is_that_of_the_case(both: str, ending: str, tmp_path: Path):
    named(tmp_path, f"{both.format('images')}{'_0000' * ('Tr' in both)}{ending}", GREYS)
    named(tmp_path, both.format("labels") + ending, ONE)
    masks = used(tmp_path, CLASSES)[1]
    assert same(masks, ONE[1:2] if ending == ".png" else ONE)


def test_a_mask_of_the_background_is_none_of_the_class_of_its_value(tmp_path: Path):
    put(tmp_path, volume(VOLUME))
    named(tmp_path, "background.nii.gz", 1 - MASKS)
    assert numbers(used(tmp_path, CLASSES)[2]) == [108, 120, 124]


def test_organs_under_the_name_of_the_case_that_the_study_does_not_name_cost_it_nothing(tmp_path: Path):
    named(tmp_path, "case1.nii.gz", GREYS)
    named(tmp_path, "case1_edema.nii.gz", ONE)
    named(tmp_path, "case1_spleen.nii.gz", OTHER)
    _, masks, data = used(tmp_path, CLASSES)
    assert same(masks, 2 * ONE)
    assert numbers(data) == [120]

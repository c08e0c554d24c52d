"""Marks of something else than a class: shares, organs, what is beside a lesion, and masks that were kept as images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
from dicom_builders import (
    MASKS,
    VOLUME,
    numbers,
    put,
    same,
    scaled,
    segmentation,
    used,
    volume,
)
from exports import LESION, export_of, taken
from test_ingest_masks import as_nifti
from test_names_of_masks import CLASSES, GREYS, MARKED, ONE, OTHER, named, picture

from icmoe.data.slices import load_mask
from icmoe.study import Label

pytestmark = pytest.mark.usefixtures("in_this_process")
SHARES = np.linspace(0.0, 1.0, GREYS.size, dtype=np.float32).reshape(GREYS.shape)
SHARED = [
    ("imagesTr/c1_0000", "labelsTr/c1", "labelsTr/c1_prob"),
    ("images/c1_ct", "masks/c1", "masks/c1_soft"),
    ("c1/ct", "c1/mask", "c1/mask_soft"),
    ("P1/c1_flair", "P1/c1_seg", "P1/c1_prob"),
    ("P1/c1", "P1/c1_seg", "P1/c1_distance_map"),
]


def meant(place: Path, labels: tuple[Label, ...], names: dict[str, tuple[str, ...]]) -> tuple[list[np.ndarray], list[int]]:
    """Ingest with what the site says that masks are called; return classes and the numbers of what was left out."""
    export = export_of(place / "export", place / "kept", labels, shares=(1.0, 0.0, 0.0))
    data = taken(replace(export, settings=export.settings.model_copy(update={"labels": names})))
    items = sorted(data.slices, key=lambda one: (one.patient, one.index))
    return [load_mask(one.mask, labels) for one in items], numbers(data)


@pytest.mark.parametrize(("image", "mask", "shares"), SHARED, ids=[shares for _, _, shares in SHARED])
def test_a_volume_of_shares_beside_a_mask_is_no_image(image: str, mask: str, shares: str, tmp_path: Path):
    for name, voxels in ((image, GREYS), (mask, ONE), (shares, SHARES)):
        named(tmp_path, f"{name}.nii.gz", voxels)
    pictures, masks, data = used(tmp_path)
    assert same(pictures, scaled(GREYS))
    assert same(masks, ONE)
    assert numbers(data) == [106]


def test_shares_do_not_take_the_place_of_a_series(tmp_path: Path):
    put(tmp_path, volume(VOLUME), "P1/z{}")
    named(tmp_path, "P1/seg.nii.gz", MASKS)
    named(tmp_path, "P1/seg_prob.nii.gz", MASKS * np.linspace(0.1, 0.9, MASKS.size, dtype=np.float32).reshape(MASKS.shape))
    pictures, masks, _ = used(tmp_path)
    assert same(pictures, scaled(VOLUME))
    assert same(masks, MASKS)


def test_a_mask_that_was_kept_as_a_series_of_images_is_no_image(tmp_path: Path):
    put(tmp_path, volume(VOLUME, SeriesDescription="t1"), "P1/mr/z{}")
    put(tmp_path, volume(MASKS.astype(np.uint16), SeriesDescription="mask"), "P1/seg/z{}")
    named(tmp_path, "P1/seg/seg.nii.gz", MASKS)
    pictures, _, data = used(tmp_path)
    assert not pictures
    assert {113, 119, 124} <= set(numbers(data))


@pytest.mark.parametrize("ending", [".nii.gz", ".png"])
@pytest.mark.parametrize("folder", ["edema_masks", "masks_edema", "edema-seg", "Edema Mask", "edemas", "edemamasks"])
def test_a_folder_may_say_class_and_kind(folder: str, ending: str, tmp_path: Path):
    named(tmp_path, f"images/a{ending}", GREYS)
    named(tmp_path, f"{folder}/a{ending}", ONE)
    assert same(used(tmp_path, CLASSES)[1], 2 * ONE if ending != ".png" else 2 * ONE[1:2])


@pytest.mark.parametrize("ending", [".nii.gz", ".png"])
@pytest.mark.parametrize("name", ["a_edema_final", "a-edema-v2", "a_edema_r1", "a_edemamask", "a_Edema_JD"])
def test_a_name_may_go_on_behind_its_class(name: str, ending: str, tmp_path: Path):
    named(tmp_path, f"P1/a{ending}", GREYS)
    named(tmp_path, f"P1/{name}{ending}", ONE)
    assert same(used(tmp_path, CLASSES)[1], 2 * ONE if ending != ".png" else 2 * ONE[1:2])


def test_a_name_with_two_classes_means_neither(tmp_path: Path):
    named(tmp_path, "P1/a.nii.gz", GREYS)
    named(tmp_path, "P1/a_edema_lesion_both.nii.gz", ONE)
    assert same(used(tmp_path, CLASSES)[1], ONE)


ORGANS = ["P1/a_brainmask", "P1/brainmask", "P1/a_bet_mask", "P1/lungmask", "P1/liver_seg_final", "P1/liver_contour"]
ORGANS += ["P1/seg_liver_JD", "P1/a_fov_mask", "brain_masks/a", "brainmasks/a", "lung_masks/a", "masks_liver/a"]
ORGANS += ["P1/a_brain_parenchyma_segmentation"]


@pytest.mark.parametrize("organ", ORGANS)
def test_the_mask_of_an_organ_is_no_lesion_however_it_is_called(organ: str, tmp_path: Path):
    folder = "P1" if organ.startswith("P1") else "images"
    named(tmp_path, f"{folder}/a.nii.gz", GREYS)
    named(tmp_path, f"{organ}.nii.gz", OTHER)
    assert numbers(used(tmp_path)[2]) == [108, 120, 124]
    named(tmp_path, f"{folder}/a_lesion.nii.gz", ONE)
    _, masks, data = used(tmp_path)
    assert same(masks, ONE)
    assert numbers(data) == [120]


@pytest.mark.parametrize("name", ["heart_mr_{}/a", "{}/liver_007", "liver_7_{}"])
def test_an_organ_that_the_image_is_called_for_too_is_that_of_the_study(name: str, tmp_path: Path):
    named(tmp_path, f"{name.format('images')}.nii.gz", GREYS)
    named(tmp_path, f"{name.format('labels')}.nii.gz", ONE)
    assert same(used(tmp_path)[1], ONE)


@pytest.mark.parametrize("ending", [".nii.gz", ".png"])
@pytest.mark.parametrize("name", ["a_no_lesion", "a_not_lesion", "a_peri_lesion", "a_non-lesion", "a_lesion_bbox"])
def test_marks_of_what_is_not_the_class_in_their_name_are_refused(name: str, ending: str, tmp_path: Path):
    named(tmp_path, f"P1/a{ending}", GREYS)
    named(tmp_path, f"P1/{name}{ending}", ONE)
    astray = name.endswith("box") and ending == ".png"  # no picture is called so up to a class
    assert numbers(used(tmp_path)[2]) == sorted([108, 123 if astray else 120, 124])


SAID = ["lesion_without_edema", "lesion_no_necrosis", "lesion_brain", "lesion_liver_seg", "a_lesion_box_free"]


@pytest.mark.parametrize("name", SAID)
def test_a_lesion_may_say_what_it_lacks_and_where_it_is(name: str, tmp_path: Path):
    named(tmp_path, "P1/a.nii.gz", GREYS)
    named(tmp_path, f"P1/{name}.nii.gz", ONE)
    assert same(used(tmp_path)[1], ONE)


def test_a_site_may_say_that_a_name_means_a_class_whatever_its_words(tmp_path: Path):
    named(tmp_path, "P1/a.nii.gz", GREYS)
    named(tmp_path, "P1/no_name.nii.gz", ONE)
    assert numbers(used(tmp_path)[2]) == [108, 120, 124]
    assert same(meant(tmp_path, LESION, {"lesion": ("no name",)})[0], ONE)


LIVER = (CLASSES[0], Label(name="liver", values=(1,)))


def test_what_lies_in_an_organ_is_not_the_organ(tmp_path: Path):
    named(tmp_path, "s1/ct.nii.gz", GREYS)
    named(tmp_path, "s1/segmentations/liver.nii.gz", ONE)
    for other in ("liver_vessels", "liver_tumor", "spleen", "lung_upper_lobe_left"):
        named(tmp_path, f"s1/segmentations/{other}.nii.gz", OTHER)
    _, masks, data = used(tmp_path, LIVER)
    assert same(masks, ONE)
    assert numbers(data) == [120] * 4


@pytest.mark.parametrize("name", ["liver_seg_final", "liver_reader2", "liver_left", "a_liver_JD"])
def test_an_organ_that_is_a_class_may_be_called_with_its_reading(name: str, tmp_path: Path):
    named(tmp_path, "P1/a.nii.gz", GREYS)
    named(tmp_path, f"P1/{name}.nii.gz", ONE)
    assert same(used(tmp_path, LIVER)[1], ONE)


KIDNEYS = (CLASSES[0], Label(name="kidney", values=(1, 255)))
PARTS = {
    "sides in names": ("s1/ct", ("s1/kidney_left", "s1/kidney_right")),
    "sides in folders": ("CXR/a", ("Manual/leftMask/a", "Manual/rightMask/a")),
    "names of a class": ("s1/ct", ("s1/kidney_one", "s1/kidney_two")),
}


@pytest.mark.parametrize("form", PARTS)
def test_two_parts_of_one_class_add_up(form: str, tmp_path: Path):
    """As TotalSegmentator writes them; two masks of one part are two readings."""
    image, parts = PARTS[form]
    ending, said = (".png" if "a" in image.split("/") else ".nii.gz"), {"kidney": ("kidney one", "kidney two")}
    named(tmp_path, image + ending, GREYS)
    for part, marks in zip(parts, (ONE, OTHER), strict=True):
        named(tmp_path, part + ending, marks)
    masks = meant(tmp_path, KIDNEYS, said)[0]
    assert same(masks, np.maximum(ONE, OTHER)[slice(1, 2) if ending == ".png" else slice(None)])
    named(tmp_path, parts[1] + ending, np.roll(ONE, 2, axis=2))  # overlaps the other side
    assert 122 in meant(tmp_path, KIDNEYS, said)[1]


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("imagesTr/CHUM-001__CT", "labelsTr/CHUM-001"),
        ("images_structural/X_11/X_11_T1", "images_segm/X_11/X_11_segm"),
        ("P1/X_FLAIR", "P1/X_msk"),
    ],
)
def test_words_for_masks_and_gaps_in_names_are_passed_over(image: str, mask: str, tmp_path: Path):
    named(tmp_path, f"{image}.nii.gz", GREYS)
    named(tmp_path, f"{mask}.nii.gz", ONE)
    assert same(used(tmp_path)[1], ONE)


@pytest.mark.parametrize("case", ["no_lesion_001", "t1_non_contrast", "slice_no_3"])
def test_a_case_may_be_called_for_what_it_lacks(case: str, tmp_path: Path):
    picture(tmp_path, f"images/{case}.png", GREYS[0])
    picture(tmp_path, f"masks/{case}.png", MARKED)
    assert same(used(tmp_path)[1], [MARKED])


def test_a_channel_of_few_values_and_a_dark_picture_of_a_patient_are_images(tmp_path: Path):
    few = np.random.default_rng(5).integers(0, 4, GREYS.shape).astype(np.uint8)
    named(tmp_path, "imagesTr/c1_0000.nii.gz", few)
    named(tmp_path, "labelsTr/c1.nii.gz", ONE)
    assert same(used(tmp_path)[1], ONE)
    picture(tmp_path / "dark", "images/P1/a.png", few[0])
    picture(tmp_path / "dark", "masks/P1/a.png", MARKED)
    picture(tmp_path / "dark", "images/P1/b.png", GREYS[1])
    picture(tmp_path / "dark", "images/P1/b_lesion.png", MARKED)
    assert same(used(tmp_path / "dark")[1], [MARKED, MARKED])


def test_a_volume_in_a_folder_for_images_that_is_called_like_a_class_is_a_mask(tmp_path: Path):
    named(tmp_path, "images/a.nii.gz", GREYS)
    nibabel.save(as_nifti(ONE, (2, 1, 0), []), tmp_path / "export/images/a_lesion.nii.gz")
    assert same(used(tmp_path)[1], ONE)


SAID_TWICE = [
    ("P1/a_tumor", "P1/a_gtv", {"lesion": ("tumor", "gtv")}),
    ("reader1/lesion/a", "reader2/gtv/a", {"lesion": ("gtv",)}),
    ("masks/reader_left/a", "masks/reader_right/a", {}),
    ("P1/a_lesion_L", "P1/a_lesion_R", {}),
]


@pytest.mark.parametrize(("one", "two", "names"), SAID_TWICE, ids=[two for _, two, _ in SAID_TWICE])
def test_two_words_or_readers_of_one_thing_are_two_readings(
    one: str, two: str, names: dict[str, tuple[str, ...]], tmp_path: Path
):
    named(tmp_path, "P1/a.nii.gz" if one.startswith("P1") else "images/a.nii.gz", GREYS)
    named(tmp_path, f"{one}.nii.gz", ONE)
    named(tmp_path, f"{two}.nii.gz", OTHER)
    masks, found = meant(tmp_path, LESION, names)
    assert not masks
    assert 122 in found


def test_an_index_that_is_kept_gives_what_a_new_one_would_when_a_name_comes_or_goes(tmp_path: Path):
    named(tmp_path, "P1/a.nii.gz", GREYS)
    named(tmp_path, "P1/a_left_upper.nii.gz", ONE)
    named(tmp_path, "P1/a_left_lower.nii.gz", OTHER)
    both, one = {"lesion": ("left upper", "left lower")}, {"lesion": ("left upper", "lower")}
    assert same(meant(tmp_path, LESION, both)[0], np.maximum(ONE, OTHER))
    assert not meant(tmp_path, LESION, one)[0]
    assert same(meant(tmp_path, LESION, both)[0], np.maximum(ONE, OTHER))


@pytest.mark.parametrize("name", ["a_liver_met", "a_liver_hcc", "a_liver_rim", "a_lung_nod", "a_brain_wmh", "a_prostate_pz"])
def test_a_short_word_behind_an_organ_is_what_is_marked_in_it(name: str, tmp_path: Path):
    named(tmp_path, "P1/a.nii.gz", GREYS)
    named(tmp_path, f"P1/{name}.nii.gz", ONE)
    assert same(used(tmp_path)[1], ONE)
    classes = (*LESION, Label(name="liver", values=(2,)))
    assert same(used(tmp_path, classes)[1], ONE)


SCANS = ["Prob_01", "prob01_t1", "femur_dist_01", "GT/ct", "labels/a_ct", "P1/ct_seg"]


@pytest.mark.parametrize("name", SCANS)
def test_a_scan_may_lie_or_be_called_as_if_it_were_none(name: str, tmp_path: Path):
    named(tmp_path, f"{name}.nii.gz", GREYS)
    named(tmp_path, f"{name.removesuffix('_seg')}_lesion.nii.gz", ONE)
    pictures, masks, _ = used(tmp_path)
    assert same(pictures, scaled(GREYS))
    assert same(masks, ONE)


def test_a_mask_in_the_folder_of_a_patients_images_is_none_of_them(tmp_path: Path):
    for name in ("P1/images/ct_0001", "P1/images/gtv_0001"):
        named(tmp_path, f"{name}.nii.gz", GREYS if "ct" in name else ONE)
    assert same(meant(tmp_path, LESION, {"lesion": ("gtv",)})[0], ONE)


def test_a_phantom_that_equals_its_mask_is_an_image_where_the_mask_names_it(tmp_path: Path):
    shown = volume(MASKS.astype(np.uint16))
    put(tmp_path, [*shown, segmentation(shown, MASKS, "BINARY")])
    assert len(used(tmp_path)[0]) == len([mask for mask in MASKS if mask.any()])


@pytest.mark.parametrize(("name", "birth"), [("ANONYMOUS", "19500101"), ("Doe^Jo", "19000101")])
def test_placeholders_for_name_and_birth_date_link_nobody(name: str, birth: str, tmp_path: Path):
    splits = set()
    for at in range(8):
        for number in ("A11", "B22"):
            greys = np.random.default_rng(ord(number[0])).integers(0, 3000, VOLUME.shape).astype(np.uint16)
            shown = volume(greys, PatientID=number, PatientName=name, PatientBirthDate=birth)
            put(tmp_path / str(at), [*shown, segmentation(shown, MASKS, "BINARY")], f"{number}/{{}}")
        place = tmp_path / str(at)
        data = taken(export_of(place / "export", place / "kept", shares=(0.5, 0.0, 0.5)))
        splits.add(len({part.split for part in data.slices}))
    assert 2 in splits, "by chance once in 256 runs"

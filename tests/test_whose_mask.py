"""A mask that names no image: it belongs to its own patient's, and to no image whose series shows the place several times."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
from dicom_builders import MASKS, VOLUME, contour, numbers, put, same, save, segmentation, structures, used, volume
from PIL import Image
from test_ingest_masks import as_nifti, square

pytestmark = pytest.mark.usefixtures("in_this_process")
ANOTHER = np.random.default_rng(7).integers(0, 3000, VOLUME.shape).astype(np.uint16)


def written(masks: np.ndarray, path: Path, kind: type[np.generic] = np.uint8, origin: float = 40.0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    made = as_nifti(masks, (2, 1, 0), [], kind)
    affine = made.affine.copy()
    affine[2, 3] += origin - 40.0
    nibabel.save(nibabel.Nifti1Image(np.asarray(made.dataobj), affine), path)


@pytest.mark.parametrize("form", ["volume", "contours"])
def test_a_mask_that_names_no_image_does_not_land_on_every_phase_of_a_series(form: str, tmp_path: Path):
    sources = volume(VOLUME)
    one = sources[0]
    shared = {name: one[name].value for name in ("FrameOfReferenceUID", "StudyInstanceUID", "SeriesInstanceUID")}
    later = volume(ANOTHER, **shared)
    made = structures([contour(square(sources[1], 2.4, 3.4, 12.6, 15.6))], space=one.FrameOfReferenceUID)
    put(tmp_path, [*sources, *later, *([made] if form == "contours" else [])])
    if form == "volume":
        written(MASKS, tmp_path / "export/lesion.nii.gz")
    data = used(tmp_path)[2]
    assert not data.slices
    assert 122 in numbers(data)


def test_a_slice_that_was_taken_twice_costs_that_slice_alone(tmp_path: Path):
    sources = volume(VOLUME)
    (again,) = volume(ANOTHER[:1])
    for name in ("FrameOfReferenceUID", "StudyInstanceUID", "SeriesInstanceUID"):
        setattr(again, name, sources[0][name].value)
    again.ImagePositionPatient = sources[2].ImagePositionPatient
    put(tmp_path, [*sources, again])
    written(MASKS, tmp_path / "export/lesion.nii.gz")
    _, classes, data = used(tmp_path)
    assert same(classes, MASKS[[0, 1, 3, 4]])
    assert numbers(data) == [124]


def test_copies_of_the_files_of_a_series_are_no_phases(tmp_path: Path):
    sources = volume(VOLUME)
    put(tmp_path, sources, "one/{}")
    put(tmp_path, sources, "again/{}")
    written(MASKS, tmp_path / "export/lesion.nii.gz")
    assert same(used(tmp_path)[1], MASKS)


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("form", ["seg", "contours"])
def test_a_mask_that_names_a_series_and_no_image_of_it_is_of_that_series(form: str, there: bool, tmp_path: Path):
    sources = volume(VOLUME)
    one = sources[0]
    other = volume(ANOTHER, **{name: one[name].value for name in ("FrameOfReferenceUID", "StudyInstanceUID")})
    if form == "seg":
        made = segmentation(sources, MASKS, "BINARY", omit_empty_frames=False)
        made.ReferencedSeriesSequence[0].ReferencedInstanceSequence = []
        for own in made.PerFrameFunctionalGroupsSequence:
            del own.DerivationImageSequence
        want = list(zip(VOLUME, MASKS, strict=True))
    else:
        made = structures([contour(square(sources[1], 2.4, 3.4, 12.6, 15.6))], listed=sources, space=one.FrameOfReferenceUID)
        (study,) = made.ReferencedFrameOfReferenceSequence[0].RTReferencedStudySequence
        study.RTReferencedSeriesSequence[0].ContourImageSequence = []
        marked = np.zeros(VOLUME.shape[1:], np.uint8)
        marked[3:13, 4:16] = 1
        want = [(VOLUME[1], marked)]
    put(tmp_path, [*(sources if there else []), *other, made])
    greys, classes, data = used(tmp_path)
    assert same(classes, [mask for _, mask in want] if there else [])
    assert all(np.corrcoef(grey.ravel(), own.ravel())[0, 1] > 0.999 for grey, (own, _) in zip(greys, want, strict=False))
    assert (123 in numbers(data)) is not there


def require_own_patient(place: Path, wrong: str, right: str) -> None:
    """Require that a volume of marks is refused under one name and used under another."""
    data = used(place)[2]
    assert not data.slices
    assert 121 in numbers(data)
    (place / "export" / wrong).rename(place / "export" / right)
    assert same(used(place)[1], MASKS)


def test_a_mask_named_for_a_patient_does_not_land_on_another_ones_series(tmp_path: Path):
    put(tmp_path, volume(VOLUME, PatientID="P1", origin=(-20.0, -30.0, 43.0)), "dicom/a{}")
    put(tmp_path, volume(ANOTHER, PatientID="P2"), "dicom/b{}")
    written(MASKS, tmp_path / "export/masks/P1.nii.gz")
    require_own_patient(tmp_path, "masks/P1.nii.gz", "masks/P2.nii.gz")


def test_volumes_of_one_name_in_every_folder_take_no_mask_of_another_folder(tmp_path: Path):
    written(VOLUME, tmp_path / "export/siteA/P1/t1.nii.gz", np.int16, origin=43.0)
    written(ANOTHER, tmp_path / "export/siteA/P2/t1.nii.gz", np.int16)
    written(MASKS, tmp_path / "export/siteA/P1/t1_mask.nii.gz")
    require_own_patient(tmp_path, "siteA/P1/t1_mask.nii.gz", "siteA/P2/t1_mask.nii.gz")


@pytest.mark.parametrize("marks", ["beside", "below", "equal"])
def test_copies_of_a_series_that_are_marked_differently_are_both_out(marks: str, tmp_path: Path):
    sources = volume(VOLUME)
    other = {"equal": MASKS, "beside": np.roll(MASKS, 1, axis=2), "below": np.roll(MASKS, 1, axis=1)}[marks]
    for rater, masks in (("first", MASKS), ("second", other)):
        for number, mask in enumerate(masks):
            save(sources[number], tmp_path / f"export/{rater}/images/{number}.dcm")
            path = tmp_path / f"export/{rater}/masks/{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(path)
    _, classes, data = used(tmp_path)
    if marks == "equal":
        assert same(classes, MASKS)
        assert numbers(data) == [125] * 5
    else:
        assert all(not one.any() for one in classes), "what both leave unmarked is used once"
        assert len(classes) == 2
        assert 122 in numbers(data)


def test_a_copy_whose_values_were_rounded_on_the_way_is_found_under_another_number(tmp_path: Path):
    for number, (slope, name) in enumerate(((1.0, "P1"), (0.731, "P2"))):
        sources = volume(VOLUME, PatientID=name, RescaleSlope=slope, RescaleIntercept=-1000.0)
        put(tmp_path, [*sources, segmentation(sources, MASKS, "BINARY")], f"{number}/{{}}")
    data = used(tmp_path)[2]
    assert len(data.slices) == 5
    assert numbers(data) == [125] * 5 or 127 in numbers(data)


@pytest.mark.parametrize("wrong", ["groupB/P3/ct_mask.nii.gz", "P3/ct_mask.nii.gz"])
def test_a_mask_in_the_folder_of_a_patient_without_images_is_not_anothers(wrong: str, tmp_path: Path):
    """As where an image was lost or is damaged; what all call alike lies closest in another patient's folder."""
    written(VOLUME, tmp_path / "export/groupA/P1/ct.nii.gz", np.int16, origin=43.0)
    written(ANOTHER, tmp_path / "export/groupB/P2/ct.nii.gz", np.int16)
    written(MASKS, tmp_path / "export" / wrong)
    require_own_patient(tmp_path, wrong, "groupB/P2/ct_mask.nii.gz")


@pytest.mark.parametrize("folder", ["P{}", "{}{}{}"])
@pytest.mark.parametrize("form", ["png", "dicom"])
def test_nor_is_it_where_one_patient_alone_has_images(folder: str, form: str, tmp_path: Path):
    one, other = (folder.format(*[number] * 3) for number in "12")
    place = tmp_path / "export"
    if form == "dicom":
        put(tmp_path, volume(VOLUME), one + "/{}")
        written(MASKS, place / other / "seg.nii.gz")
    else:
        for path, pixels in ((place / one / "1.png", VOLUME[0]), (place / other / "1_mask.png", MASKS[2])):
            path.parent.mkdir(parents=True)
            Image.fromarray(pixels).save(path)
    data = used(tmp_path)[2]
    assert not data.slices
    assert 121 in numbers(data)

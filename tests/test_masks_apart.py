"""Masks that speak of the same images, or seem to: none makes background of what another marks, none lands on another's image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import highdicom as hd
import nibabel
import numpy as np
import pytest
from dicom_builders import MASKS, VOLUME, contour, item, numbers, put, same, save, scaled, segmentation, structures, used, volume
from exports import export_of, taken
from PIL import Image
from pydicom.dataset import Dataset
from test_ingest_masks import TWO, as_nifti, square

pytestmark = pytest.mark.usefixtures("in_this_process")
ANOTHER = np.random.default_rng(7).integers(0, 3000, VOLUME.shape).astype(np.uint16)
BOX = (2.4, 3.4, 12.6, 15.6)
FILLED = np.zeros((20, 24), np.uint8)
FILLED[3:13, 4:16] = 1


def references(sources: Sequence[Dataset]) -> list[Dataset]:
    return [item(ReferencedSOPClassUID=one.SOPClassUID, ReferencedSOPInstanceUID=one.SOPInstanceUID) for one in sources]


def drawn(sources: Sequence[Dataset], *slices: int, listed: Sequence[Dataset] = (), name: str = "lesion") -> Dataset:
    contours = [contour(square(sources[number], *BOX), sources[number]) for number in slices]
    return structures(contours, listed=listed, space=sources[0].FrameOfReferenceUID, name=name)


def test_what_one_mask_only_lists_another_one_marks(tmp_path: Path):
    sources = volume(VOLUME)
    put(tmp_path, [*sources, segmentation(sources, MASKS, "BINARY"), drawn(sources, 4)])
    assert same(used(tmp_path)[1], [*MASKS[:4], FILLED])


def test_contours_that_list_a_series_leave_its_other_slices_to_a_volume(tmp_path: Path):
    sources = volume(VOLUME)
    put(tmp_path, [*sources, drawn(sources, 1, listed=sources)])
    nibabel.save(as_nifti(MASKS, (2, 1, 0), []), tmp_path / "export/m.nii.gz")
    assert same(used(tmp_path)[1], [MASKS[0], FILLED, *MASKS[2:]])


def test_two_forms_that_mark_two_classes_are_both_used(tmp_path: Path):
    sources = volume(VOLUME)
    put(tmp_path, [*sources, segmentation(sources, MASKS, "BINARY"), drawn(sources, 2, name="edema")])
    want = MASKS.copy()
    want[2] = np.maximum(want[2], 2 * FILLED)
    assert same(used(tmp_path, TWO)[1], want)


def registered(sources: Sequence[Dataset]) -> list[Dataset]:
    """Return another series of the same body in the same place."""
    one = sources[0]
    return volume(ANOTHER, FrameOfReferenceUID=one.FrameOfReferenceUID, StudyInstanceUID=one.StudyInstanceUID)


@pytest.mark.parametrize("form", ["seg", "contours"])
def test_a_listed_image_in_whose_place_something_is_marked_is_no_background(form: str, tmp_path: Path):
    sources = volume(VOLUME)
    other = registered(sources)
    if form == "seg":
        made = segmentation(sources, MASKS, "BINARY")
        made.ReferencedSeriesSequence.append(
            item(SeriesInstanceUID=other[0].SeriesInstanceUID, ReferencedInstanceSequence=references(other))
        )
    else:
        made = drawn(sources, 1, 2, 3, listed=[*sources, *other])
    put(tmp_path, [*sources, *other, made])
    classes, data = used(tmp_path)[1:]
    marked = [one for one in classes if one.any()]
    assert len(marked) == 3
    assert len(classes) == 7, "the three slices of the other series where something is marked are not used"
    assert numbers(data) == [124]


def two_regions(lesion: Sequence[Dataset], edema: Sequence[Dataset]) -> Dataset:
    """Return contours of a lesion on slices 1 and 2 of one series and of an edema on 2 and 3 of another."""
    made = drawn(lesion, 1, 2, listed=[*lesion, *edema])
    below = [contour(square(edema[number], 14.6, 5.6, 17.4, 9.4), edema[number]) for number in (2, 3)]
    made.StructureSetROISequence.append(item(ROINumber=2, ROIName="edema"))
    made.ROIContourSequence.append(item(ReferencedROINumber=2, ContourSequence=below))
    return made


@pytest.mark.parametrize("there", [True, False])
def test_an_image_that_one_class_is_drawn_on_is_no_background_of_one_drawn_on_an_image_that_is_not_there(
    there: bool, tmp_path: Path
):
    sources = volume(VOLUME)
    lesion = sources if there else registered(sources)
    put(tmp_path, [*sources, two_regions(lesion, sources)])
    edema = np.zeros_like(FILLED)
    edema[15:18, 6:10] = 2
    empty = np.zeros_like(FILLED)
    want = [empty, FILLED, np.maximum(FILLED, edema), edema, empty]
    assert same(used(tmp_path, TWO)[1], want if there else [want[n] for n in (0, 3, 4)])


@pytest.mark.parametrize("number", ["Doe 01", ""])
def test_patients_of_one_study_are_one_person(number: str, tmp_path: Path):
    sources = volume(VOLUME)
    one = sources[0]
    shown = volume(ANOTHER, StudyInstanceUID=one.StudyInstanceUID, PatientID=number)
    for at in range(6):
        place = tmp_path / str(at)
        put(place, [*sources, *shown], "i{}")
        masks = [segmentation(of, MASKS, "BINARY") for of in (sources, shown)]
        put(place, masks, "m{}")
        data = taken(export_of(place / "export", place / "kept", shares=(0.5, 0.0, 0.5)))
        assert len({part.split for part in data.slices}) == 1
        assert len({part.patient for part in data.slices}) == 2 or [each for each in numbers(data) if each != 108] == [127] * 5


@pytest.mark.parametrize("number", ["", "B22"])
def test_files_of_one_name_and_birth_date_stand_in_one_split_whatever_number_they_have(number: str, tmp_path: Path):
    """As after a merger of clinics, or where one scanner was given no number."""
    person = {"PatientName": "Doe^Jo", "PatientBirthDate": "19500101"}
    for at in range(6):
        place = tmp_path / str(at)
        for study, own in enumerate(("A11", number)):
            greys = np.random.default_rng(study).integers(0, 3000, VOLUME.shape).astype(np.uint16)
            shown = volume(greys, PatientID=own, **person)
            put(place, [*shown, segmentation(shown, MASKS, "BINARY")], f"{study}/{{}}")
        data = taken(export_of(place / "export", place / "kept", shares=(0.5, 0.0, 0.5)))
        assert len({part.patient for part in data.slices}) == 2
        assert len({part.split for part in data.slices}) == 1


def test_a_mask_in_a_folder_of_another_name_than_all_images_is_nobodys(tmp_path: Path):
    for name, seed in (("P2", 2), ("P3", 3)):
        shown = np.random.default_rng(seed).integers(0, 3000, VOLUME.shape).astype(np.uint16)
        put(tmp_path, volume(shown, PatientID=name, origin=(-20.0, -30.0, 40.0 if name == "P2" else 43.0)), name + "/dicom/{}")
    (tmp_path / "export/P1/dicom").mkdir(parents=True)
    (tmp_path / "export/P1/dicom/0").write_bytes(b"\0" * 128 + b"DICM" + b"broken")
    nibabel.save(as_nifti(MASKS, (2, 1, 0), []), tmp_path / "export/P1/mask.nii.gz")
    data = used(tmp_path)[2]
    assert not data.slices
    assert 121 in numbers(data)
    (tmp_path / "export/P1/mask.nii.gz").rename(tmp_path / "export/P2/mask.nii.gz")
    assert same(used(tmp_path)[1], MASKS)


def test_a_picture_of_marks_in_a_folder_of_another_name_than_its_image_is_nobodys(tmp_path: Path):
    for name, first in (("P2", 0), ("P3", 5)):
        shown = volume(np.random.default_rng(first).integers(0, 3000, VOLUME.shape).astype(np.uint16), PatientID=name)
        for number, data in enumerate(shown):
            save(data, tmp_path / f"export/images/{name}/{first + number}.dcm")
    (tmp_path / "export/masks/P1").mkdir(parents=True)
    for number in range(5):
        Image.fromarray(MASKS[number]).save(tmp_path / f"export/masks/P1/{number}.png")
    data = used(tmp_path)[2]
    assert not data.slices
    assert 121 in numbers(data)
    (tmp_path / "export/masks/P1").rename(tmp_path / "export/masks/P2")
    assert same(used(tmp_path)[1], MASKS)


def test_a_label_map_beside_a_series_does_not_take_its_mask(tmp_path: Path):
    put(tmp_path, volume(VOLUME, PatientID="P1"), "P1/dicom/{}")
    nibabel.save(as_nifti(MASKS, (2, 1, 0), []), tmp_path / "export/P1/lesion.nii.gz")
    many = np.arange(MASKS.size).reshape(MASKS.shape) % 45
    nibabel.save(as_nifti(many, (2, 1, 0), []), tmp_path / "export/P1/aseg.nii.gz")
    data = used(tmp_path)[2]
    assert not data.slices
    assert 122 in numbers(data)
    assert same(used(tmp_path, exclude=("*/aseg.nii.gz",))[1], MASKS)


def test_contours_without_references_belong_to_the_visit_of_their_study(tmp_path: Path):
    first = volume(VOLUME)
    later = volume(ANOTHER, FrameOfReferenceUID=first[0].FrameOfReferenceUID)
    made = structures([contour(square(first[1], *BOX))], space=first[0].FrameOfReferenceUID)
    put(tmp_path, [*later, *first, made])
    assert numbers(used(tmp_path)[2]) == [108, 122, 124, 124]
    made.StudyInstanceUID = first[0].StudyInstanceUID
    put(tmp_path, [*later, *first, made])
    pictures, classes, _ = used(tmp_path)
    assert same(classes, [FILLED])
    assert same(pictures, scaled([VOLUME[1]]))


@pytest.mark.parametrize("folder", ["{}/", "", "imagesTr/"])
def test_all_sequences_of_a_case_share_its_mask_and_are_one_patient(folder: str, tmp_path: Path):
    for case in ("BraTS_001", "BraTS_0012"):
        for seed, sequence in enumerate(("t1", "t1ce", "t2", "flair")):
            shown = np.random.default_rng([seed, len(case)]).integers(0, 3000, VOLUME.shape).astype(np.int16)
            path = tmp_path / f"export/{folder.format(case)}{case}_{sequence}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            nibabel.save(as_nifti(shown, (2, 1, 0), [], np.int16), path)
        masks = tmp_path / "export/labelsTr" if folder == "imagesTr/" else path.parent
        masks.mkdir(exist_ok=True)
        nibabel.save(as_nifti(MASKS, (2, 1, 0), []), masks / f"{case}_seg.nii.gz")
    _, classes, data = used(tmp_path)
    assert len({part.patient for part in data.slices}) == 2
    assert sum(map(np.count_nonzero, classes)) == 8 * np.count_nonzero(MASKS)
    assert not numbers(data)


def test_a_volume_for_each_class_is_one_mask(tmp_path: Path):
    put(tmp_path, volume(VOLUME))
    edema = np.roll(MASKS, 6, axis=2) * 2
    for name, masks in (("lesion", MASKS), ("edema", edema)):
        nibabel.save(as_nifti(masks, (2, 1, 0), []), tmp_path / f"export/{name}.nii.gz")
    assert same(used(tmp_path, TWO)[1], np.maximum(MASKS, edema))
    nibabel.save(as_nifti(edema.clip(0, 1), (2, 1, 0), []), tmp_path / "export/edema_again.nii.gz")
    assert 122 in numbers(used(tmp_path, TWO)[2]), "two readings of one class"


@pytest.mark.parametrize("value", [1, 255])
@pytest.mark.parametrize("names", [("lesion", "edema"), ("Edema_mask",), ("lesion", "edema-2")])
def test_a_volume_that_marks_one_thing_means_the_class_that_it_is_called(names: tuple[str, ...], value: int, tmp_path: Path):
    """As TotalSegmentator writes them: 1 in every file, whatever the study calls 1."""
    put(tmp_path, volume(VOLUME))
    marked = [np.roll(MASKS, 6 * number, axis=2) for number in range(len(names))]
    for name, masks in zip(names, marked, strict=True):
        nibabel.save(as_nifti(masks * np.uint8(value), (2, 1, 0), []), tmp_path / f"export/{name}.nii.gz")
    want = [masks * np.uint8(1 if name == "lesion" else 2) for name, masks in zip(names, marked, strict=True)]
    assert same(used(tmp_path, TWO)[1], np.max(want, axis=0))


@pytest.mark.parametrize("names", [("Lesion_1", "lesion 2"), ("lesion-1", "LESION12"), ("edema 1", "lesion")])
def test_objects_of_a_class_may_be_counted(names: tuple[str, str], tmp_path: Path):
    sources = volume(VOLUME)
    apart = np.roll(MASKS, 10, axis=1)
    save(segmentation(sources, np.stack([MASKS, apart], axis=-1), "BINARY", names), tmp_path / "export/mask")
    put(tmp_path, sources)
    want = np.maximum(2 * MASKS if names[0] == "edema 1" else MASKS, apart)
    assert same(used(tmp_path, TWO)[1], want)


@pytest.mark.parametrize("step_mm", [10.0, 3.0, 5.0])
def test_images_within_a_thicker_slice_of_a_mask_are_no_background(step_mm: float, tmp_path: Path):
    sources = volume(VOLUME)
    start = np.asarray(sources[0].ImagePositionPatient, float)
    places = [start + np.asarray([0.0, 0.0, height]) for height in np.arange(5.0, 20.1, step_mm)]
    made = segmentation(
        sources,
        np.ones((len(places), 20, 24), np.uint8),
        "BINARY",
        plane_positions=[hd.PlanePositionSequence("PATIENT", list(place)) for place in places],
        plane_orientation=hd.PlaneOrientationSequence("PATIENT", [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]),
        pixel_measures=hd.PixelMeasuresSequence([1.0, 1.5], step_mm, step_mm),
    )
    put(tmp_path, [*sources, made])
    data = used(tmp_path)[2]
    empty = [part for part in data.slices if part.classes == (0,)]
    assert len(empty) == (0 if step_mm == 10.0 else 1), "the first slice lies before the mask, or at its edge"
    assert len(data.slices) - len(empty) == {10.0: 2, 3.0: 2, 5.0: 4}[step_mm]

"""Whose a slice is where its file says another than its series, and persons who have several numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dicom_builders import MASKS, VOLUME, item, numbers, put, scaled, segmentation, used, volume
from exports import export_of, taken
from pydicom.dataset import Dataset

from icmoe.data.ingest.catalogue import STRAY
from icmoe.data.ingest.finding import files_of
from icmoe.data.ingest.run import forget

pytestmark = pytest.mark.usefixtures("in_this_process")
NOBODY = {"PatientID": "", "PatientName": ""}
OTHER = {"PatientID": "Roe 7", "PatientName": "Roe^Al"}


def marked(shift: int = 0, **elements: Any) -> list[Dataset]:
    """Return a series of five slices and its masks."""
    sources = volume(np.roll(VOLUME, shift, axis=2), **elements)
    return [*sources, segmentation(sources, MASKS, "BINARY")]


def change(data: Dataset, **elements: Any) -> None:
    for name, value in elements.items():
        setattr(data, name, value)


@pytest.mark.parametrize("named", [NOBODY, {**NOBODY, "StudyInstanceUID": ""}, {"PatientID": ""}, OTHER])
def test_a_slice_of_nobody_or_of_another_costs_itself_and_not_its_series(tmp_path: Path, named: dict[str, str]):
    objects = marked()
    change(objects[2], **named)
    put(tmp_path, objects)
    pictures, classes, data = used(tmp_path)
    assert [bool(marks.any()) for marks in classes] == [False, True, True, False]
    assert {item.patient for item in data.slices} == {data.slices[0].patient}
    ((why, subject),) = [(fault.what, fault.where) for fault in data.exclusions if fault.number == 117]
    assert why == STRAY
    export = export_of(tmp_path / "export", tmp_path / "kept")
    assert files_of(export, subject.removeprefix("Elm/")) == ["z4"]
    assert all(one.spacing_mm is None for one in data.slices), "where a slice is lost, the stack is uneven"
    assert len(pictures) == 4


@pytest.mark.parametrize("others", [2, 3])
def test_a_series_of_two_patients_is_nobodys(tmp_path: Path, others: int):
    objects = marked()
    for data in objects[:others]:
        change(data, **OTHER)
    put(tmp_path, objects)
    data = used(tmp_path)[2]
    assert not data.slices
    assert "its files name no patient, or several" in {fault.what for fault in data.exclusions}


def test_two_files_that_claim_to_be_one_slice_of_two_patients_are_not_decided_between(tmp_path: Path):
    objects = marked()
    other = Dataset()
    other.update(objects[2])
    other.file_meta = objects[2].file_meta
    change(other, **OTHER)
    put(tmp_path, [*objects, other])
    assert not used(tmp_path)[2].slices


@pytest.mark.parametrize("form", ["sequence", "list", "third"])
def test_a_person_of_two_numbers_stands_in_one_split(tmp_path: Path, form: str):
    """Where a file says that its patient has another number too, the two are one person."""
    further: dict[str, Any] = {
        "sequence": {"OtherPatientIDsSequence": [item(PatientID=" two", TypeOfPatientID="TEXT")]},
        "list": {"OtherPatientIDs": ["x", "TWO"]},
        "third": {"OtherPatientIDs": "three"},
    }[form]
    put(tmp_path, marked(PatientID="one", **further), "a{}")
    put(tmp_path, marked(1, PatientID="two", **({"OtherPatientIDs": "three"} if form == "third" else {})), "b{}")
    put(tmp_path, marked(2, PatientID="four"), "c{}")
    (tmp_path / "split.csv").write_text("patient,split\none,train\ntwo,test\nfour,train\n")
    export = replace(export_of(tmp_path / "export", tmp_path / "kept"), split_file=tmp_path / "split.csv")
    data = taken(export)
    assert {split: len(data.of(split)) for split in ("train", "val", "test")} == {"train": 5, "val": 0, "test": 5}
    assert numbers(data) == [127] * 5
    assert "a number with a patient of another split" in data.exclusions[0].what
    (tmp_path / "split.csv").write_text("patient,split\none,test\ntwo,test\nfour,train\n")
    assert len(taken(export).of("test")) == 10


def test_a_person_of_several_numbers_without_a_named_split_loses_no_slice(tmp_path: Path):
    for number in range(8):
        put(tmp_path, marked(number, PatientID=f"n{number}", OtherPatientIDs=f"n{number + 1}"), f"{number}-{{}}")
    data = taken(export_of(tmp_path / "export", tmp_path / "kept", shares=(0.5, 0.0, 0.5)))
    assert (len(data.slices), 127 in numbers(data)) == (40, False)
    assert len({one.patient for one in data.slices}) == 8
    assert len({one.split for one in data.slices}) == 1


@pytest.mark.parametrize("form", ["1001_V{}", "ABC-07-FU{}", "1001-2020010{}"])
def test_a_number_for_each_visit_of_a_patient_stands_in_one_split(tmp_path: Path, form: str):
    for number in range(1, 5):
        put(tmp_path, marked(number, PatientID=form.format(number)), f"{number}-{{}}")
    data = taken(export_of(tmp_path / "export", tmp_path / "kept", shares=(0.5, 0.0, 0.5)))
    assert (len(data.slices), len({one.patient for one in data.slices})) == (20, 4)
    assert len({one.split for one in data.slices}) == 1
    assert forget(tmp_path / "kept", "1001" if "1001" in form else "abc-07") == 20


@pytest.mark.parametrize("folder", ["anna/study{}", "clinic A/anna/visit{}"])
def test_studies_of_nobody_in_one_persons_folder_stand_in_one_split(tmp_path: Path, folder: str):
    """Where nobody is named each study counts as a patient; four studies of a folder are hardly four persons'."""
    for number in range(1, 5):
        put(tmp_path, marked(number, **NOBODY), f"{folder.format(number)}/{{}}")
    data = taken(export_of(tmp_path / "export", tmp_path / "kept", shares=(0.5, 0.0, 0.5)))
    assert len({one.patient for one in data.slices}) == 4
    assert (len(data.slices), len({one.split for one in data.slices})) == (20, 1)


def test_a_patient_is_forgotten_under_every_number_that_its_files_give(tmp_path: Path):
    put(tmp_path, marked(PatientID="one", OtherPatientIDs="old"), "a{}")
    put(tmp_path, marked(1, PatientID="two"), "b{}")
    assert len(used(tmp_path)[2].slices) == 10
    assert forget(tmp_path / "kept", "old") == 5
    assert len(used(tmp_path)[2].slices) == 5


@pytest.mark.parametrize("number", [3, None])
def test_slices_without_the_uid_of_their_series_are_one_by_its_number(tmp_path: Path, number: int | None):
    """Else each would have a window of its own, and be no stack."""
    for seed, patient in enumerate(("one", "two")):
        objects = marked(seed, PatientID=patient, StudyInstanceUID="1.2.3", SeriesNumber=number)
        for data in objects[:5]:
            del data.SeriesInstanceUID
        put(tmp_path, objects, f"{patient}{{}}")
    pictures, _, data = used(tmp_path)
    assert len(data.slices) == 10
    assert {item.spacing_mm for item in data.slices} == {(5.0, 1.0, 1.5) if number else None}
    both = [*scaled(VOLUME), *scaled(np.roll(VOLUME, 1, axis=2))]
    found = sorted(float(picture.mean()) for picture in pictures)
    assert np.allclose(found, sorted(float(picture.mean()) for picture in both), atol=1e-6) == bool(number)

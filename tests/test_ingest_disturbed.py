"""An export that changes, or a share that fails, while it is read: no picture of another patient, nothing lost for good."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from dicom_builders import MASKS, VOLUME, derived, item, numbers, plain_segmentation, put, same, save, scaled, used, volume
from exports import export_of

from icmoe.data.ingest import work
from icmoe.data.ingest.run import ingest

pytestmark = pytest.mark.usefixtures("in_this_process")
STEPS = ["_read_files", "_publish"]


def written(place: Path) -> Path:
    """Write a series with its mask, and return one of its files."""
    images = volume(VOLUME)
    put(place, images)
    save(plain_segmentation(MASKS, [item(DerivationImageSequence=[derived(one)]) for one in images]), place / "export/s")
    return place / "export/z3"


def during(patch: pytest.MonkeyPatch, step: str, before: Callable[[], object], after: Callable[[], object] = str) -> None:
    """Let something happen just before and just after a step of ingest."""
    real = getattr(work, step)

    def disturbed(*values: Any) -> None:  # anything
        before()
        real(*values)
        after()

    patch.setattr(work, step, disturbed)


@pytest.mark.parametrize("step", STEPS)
def test_a_file_that_cannot_be_read_for_a_while_is_read_by_the_next_run(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file, away = written(tmp_path), tmp_path / "away"
    with monkeypatch.context() as patch:
        during(patch, step, lambda: file.rename(away), lambda: away.rename(file))
        pictures, _, data = used(tmp_path)
    assert (len(pictures), numbers(data)) == (4, [117 if step == "_read_files" else 118])
    pictures, classes, data = used(tmp_path)
    assert same(pictures, scaled(list(VOLUME)))
    assert np.array_equal(classes, MASKS)
    assert not numbers(data)
    assert not ingest(export_of(tmp_path / "export", tmp_path / "kept", shares=(1.0, 0.0, 0.0))), "there is nothing left to do"


@pytest.mark.parametrize("step", STEPS)
def test_the_picture_of_another_patient_that_takes_a_files_place_is_not_the_first_ones(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = written(tmp_path)
    before = file.read_bytes()

    def replaced() -> None:
        other = pydicom.dcmread(file)
        other.PatientID, other.PixelData = "Doe 2", bytes(reversed(other.PixelData))
        other.save_as(file)

    with monkeypatch.context() as patch:
        during(patch, step, replaced)
        pictures, _, data = used(tmp_path)
    if step == "_read_files":  # it is one of another patient in this series, and costs itself
        assert same(pictures, scaled([one for number, one in enumerate(VOLUME) if number != 2]))
        assert numbers(data) == [117]
    else:
        assert not pictures
        assert set(numbers(data)) - {108} == {118}
    file.write_bytes(before)
    pictures, classes, _ = used(tmp_path)
    assert same(pictures, scaled(list(VOLUME)))
    assert np.array_equal(classes, MASKS)

"""Files that claim to be one instance: copies are one image; of two images under one name nobody knows which a mask means."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
from dicom_builders import (
    AXIAL,
    MASKS,
    VOLUME,
    common,
    enhanced,
    numbers,
    place,
    put,
    same,
    save,
    scaled,
    segmentation,
    used,
    volume,
)
from exports import LESION, export_of, taken
from pydicom.dataset import Dataset
from pydicom.uid import RLELossless

pytestmark = pytest.mark.usefixtures("in_this_process")


def masked() -> list[Dataset]:
    sources = volume(VOLUME)
    return [*sources, segmentation(sources, MASKS, "BINARY", omit_empty_frames=False)]


def other_pixels(data: Dataset) -> None:
    stored = np.frombuffer(data.PixelData, np.uint16).copy()
    stored[0] ^= 1
    data.PixelData = stored.tobytes()


def other_places(data: Dataset) -> None:
    """Show the same values upside down."""
    stored = np.frombuffer(data.PixelData, np.uint16).reshape(data.Rows, -1)
    data.PixelData = stored[::-1].tobytes()


def another_scale(data: Dataset) -> None:
    data.RescaleSlope, data.RescaleIntercept = 2.0, 0.0


def more_rows(data: Dataset) -> None:
    data.PixelData += data.PixelData[: data.Columns * 2]
    data.Rows += 1


def moved(data: Dataset) -> None:
    data.ImagePositionPatient = [v + 3.0 for v in data.ImagePositionPatient]


def without_place(data: Dataset) -> None:
    del data.ImagePositionPatient


@pytest.mark.parametrize("name", ["a-first", "zz-last"])
@pytest.mark.parametrize("harm", [other_pixels, other_places, another_scale])
def test_a_frame_whose_instance_shows_two_pictures_is_not_used(harm: Callable[[Dataset], None], name: str, tmp_path: Path):
    objects = masked()
    put(tmp_path, objects)
    twin = deepcopy(objects[2])
    harm(twin)
    save(twin, tmp_path / "export" / name)
    classes, data = used(tmp_path)[1:]
    assert same(classes, [MASKS[n] for n in (0, 1, 3, 4)])
    assert numbers(data) == [122, 125]


@pytest.mark.parametrize("name", ["a-first", "zz-last"])
@pytest.mark.parametrize("harm", [more_rows, moved, without_place])
def test_a_mask_of_an_instance_of_two_sizes_or_places_is_not_used(harm: Callable[[Dataset], None], name: str, tmp_path: Path):
    objects = masked()
    put(tmp_path, objects)
    twin = deepcopy(objects[2])
    harm(twin)
    save(twin, tmp_path / "export" / name)
    assert numbers(used(tmp_path)[2]) == [108, 122, 124]


def as_it_is(data: Dataset) -> None:
    data.PatientComments = "sent again"


def compressed(data: Dataset) -> None:
    data.compress(RLELossless, generate_instance_uid=False)


def rounded(data: Dataset) -> None:
    data.ImagePositionPatient = [v + 0.0004 for v in data.ImagePositionPatient]


@pytest.mark.parametrize("change", [as_it_is, compressed, rounded])
def test_a_copy_of_an_instance_changes_nothing(change: Callable[[Dataset], None], tmp_path: Path):
    objects = masked()
    put(tmp_path, objects)
    twin = deepcopy(objects[2])
    change(twin)
    save(twin, tmp_path / "export/a-first")
    pictures, classes, data = used(tmp_path)
    assert same(pictures, scaled(list(VOLUME)))
    assert same(classes, MASKS)
    assert numbers(data) == [125]


def test_a_copy_that_changes_later_is_noticed(tmp_path: Path):
    objects = masked()
    put(tmp_path, objects)
    twin = save(deepcopy(objects[2]), tmp_path / "export/zz-last")
    export = export_of(tmp_path / "export", tmp_path / "kept", LESION, shares=(1.0, 0.0, 0.0))
    assert len(taken(export).slices) == 5
    changed = deepcopy(objects[2])
    other_pixels(changed)
    save(changed, twin)
    assert len(taken(export).slices) == 4
    twin.unlink()
    assert len(taken(export).slices) == 5


def test_of_two_objects_of_many_frames_the_frames_that_agree_are_used(tmp_path: Path):
    frames = [place((0.0, 0.0, 5.0 * n), stack=n + 1) for n in range(5)]
    one = enhanced(VOLUME, frames, common(axes=AXIAL))
    mask = segmentation([one], MASKS, "BINARY", omit_empty_frames=False)
    twin, shown = deepcopy(one), VOLUME.copy()
    shown[3] += 1
    twin.PixelData = shown.tobytes()
    put(tmp_path, [one, twin, mask])
    pictures, classes, data = used(tmp_path)
    assert same(classes, [MASKS[n] for n in (0, 1, 2, 4)])
    assert len(pictures) == 4
    assert 122 in numbers(data)

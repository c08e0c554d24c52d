"""A parcellation of a whole brain or body has more values than other masks, and still is no image."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
from dicom_builders import MASKS, numbers, used

from icmoe.data.ingest.volumes import looks_like_parcels

pytestmark = pytest.mark.usefixtures("in_this_process")
SHAPE = (40, 48, 20)
WHERE = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), axis=-1)
RNG = np.random.default_rng(0)


def parcels(count: int) -> np.ndarray:
    """Return `count` regions, each of the voxels nearest to a seed, within a body; their numbers are in no order."""
    rng = np.random.default_rng(count)
    nearest = np.stack([((WHERE - seed) ** 2).sum(-1) for seed in rng.uniform(0, SHAPE, (count, 3))]).argmin(0)
    body = ((WHERE / SHAPE - 0.5) ** 2).sum(-1) < 0.22
    return np.where(body, rng.permutation(2000)[:count][nearest] + 1, 0).astype(np.uint16)


@pytest.mark.parametrize("count", [40, 104])
@pytest.mark.parametrize("kind", [np.uint16, np.float32])
def test_patches_of_many_values_are_a_mask(count: int, kind: type):
    assert looks_like_parcels(parcels(count).astype(kind))


IMAGES = {
    "a scan": RNG.normal(300, 60, SHAPE).clip(0).astype(np.uint16),
    "a scan whose air is 0": np.where(WHERE[..., 0] > 30, RNG.integers(0, 400, SHAPE), 0).astype(np.uint16),
    "a slow ramp along one axis": (WHERE[..., 1] + 1).repeat(4, axis=1).astype(np.uint8),
    "a slow ramp along all": (WHERE.sum(-1) // 2 + 1).astype(np.uint8),
    "pixels drawn large, slice by slice": RNG.integers(1, 200, (10, 12, 20)).repeat(4, 0).repeat(4, 1).astype(np.uint8),
    "below zero": parcels(60).astype(np.int32) - 1024,
    "between whole numbers": parcels(60) + np.float32(0.5),
    "one slice": RNG.integers(0, 200, (40, 48, 1)).astype(np.uint8),
}


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_is_none(name: str):
    assert not looks_like_parcels(IMAGES[name])


def test_a_parcellation_beside_a_scan_is_refused_for_its_values_and_is_no_second_scan(tmp_path: Path):
    marked = np.moveaxis(MASKS.repeat(4, 0).repeat(2, 1).repeat(2, 2), 0, 2).astype(np.uint8)
    values = {"t1": IMAGES["a scan"], "lesion": marked, "total": parcels(60)}
    (tmp_path / "export/P1").mkdir(parents=True)
    for name, voxels in values.items():
        nibabel.save(nibabel.Nifti1Image(voxels, np.diag([1.0, 1.0, 3.0, 1.0])), tmp_path / f"export/P1/{name}.nii.gz")
    data = used(tmp_path)[2]
    assert data.images_found == SHAPE[2]
    assert numbers(data) == [106]
    assert [one.sum() for one in used(tmp_path)[1]] == marked.sum(axis=(0, 1)).tolist(), "the mask beside it is used"
    (tmp_path / "export/P1/total.nii.gz").unlink()
    assert [one.sum() for one in used(tmp_path)[1]] == marked.sum(axis=(0, 1)).tolist()

"""NIfTI volumes as other programs and old disks leave them."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
from dicom_builders import MASKS, VOLUME, numbers, put, same, used, volume

pytestmark = pytest.mark.usefixtures("in_this_process")
AXES = np.diag([-1.5, -1.0, 5.0, 1.0])
VOXELS, CLASSES = VOLUME.transpose(2, 1, 0), MASKS.transpose(2, 1, 0)


def nifti(place: Path, name: str, voxels: np.ndarray) -> Path:
    path = place / "export" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(voxels, AXES), path)
    return path


@pytest.mark.parametrize(("back", "flip"), [(5, 0x40), (8, 0x01), (1, 0x01), (0, 0)])
def test_a_compressed_volume_that_does_not_agree_with_its_checksum_is_damaged(back: int, flip: int, tmp_path: Path):
    """The voxels can be read, and nobody knows which of them are wrong (RFC 1952, 2.3.1)."""
    nifti(tmp_path, "imagesTr/a.nii.gz", VOXELS)
    path = nifti(tmp_path, "labelsTr/a.nii.gz", CLASSES)
    packed = bytearray(path.read_bytes())
    packed[-back] ^= flip
    path.write_bytes(packed)
    _, masks, data = used(tmp_path)
    assert numbers(data) == ([108, 117, 124] if flip else [])
    assert same(masks, [] if flip else MASKS)


@pytest.mark.parametrize("ground", [np.nan, -1.0])
def test_a_mask_whose_ground_is_no_class_is_no_image(ground: float, tmp_path: Path):
    nifti(tmp_path, "imagesTr/a.nii.gz", VOXELS)
    nifti(tmp_path, "labelsTr/a.nii.gz", np.where(CLASSES > 0, CLASSES, np.float32(ground)))
    data = used(tmp_path)[2]
    assert data.images_found == len(VOLUME)
    assert numbers(data) == [106, 108]


def test_an_image_with_values_below_zero_or_none_at_its_edges_is_an_image(tmp_path: Path):
    hounsfield = VOXELS.astype(np.float32) - 1024.0
    hounsfield[0] = np.nan
    nifti(tmp_path, "imagesTr/a.nii.gz", hounsfield)
    nifti(tmp_path, "labelsTr/a.nii.gz", CLASSES)
    assert same(used(tmp_path)[1], MASKS)


@pytest.mark.parametrize("across", [0, 1, 2])
def test_a_single_slice_is_one_picture_however_thin_it_is(across: int, tmp_path: Path):
    """As of the knee or the spine, sagittal or coronal, with a slice that is not half again as thick as a pixel is wide."""
    for name, pixels in (("imagesTr/a.nii.gz", VOLUME[2]), ("labelsTr/a.nii.gz", MASKS[2])):
        (tmp_path / "export" / name).parent.mkdir(parents=True, exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(np.expand_dims(pixels, across), np.eye(4)), tmp_path / "export" / name)
    pictures, masks, data = used(tmp_path)
    assert [picture.size for picture in pictures] == [VOLUME[2].size]
    assert np.count_nonzero(masks) == np.count_nonzero(MASKS[2])
    assert min(pictures[0].shape) > 1
    assert not numbers(data)


@pytest.mark.parametrize("lost", [1, 2, 3])
@pytest.mark.parametrize("packed", [True, False])
def test_a_mask_drawn_on_a_series_that_lost_a_slice_marks_no_other_slice(packed: bool, lost: int, tmp_path: Path):
    """A converter that takes distances for equal lays every slice behind the gap where the one before it was."""
    left = [number for number in range(len(VOLUME)) if number != lost]
    series = volume(VOLUME, origin=(0.0, 0.0, 0.0))
    put(tmp_path, [series[number] for number in left])
    nifti(tmp_path, "mask.nii.gz", CLASSES[:, :, left] if packed else CLASSES)
    _, masks, data = used(tmp_path)
    assert numbers(data) == ([108, 121, 124] if packed else [])
    assert same(masks, [] if packed else MASKS[left])


@pytest.mark.parametrize("drawn", [slice(1, 4), slice(2, 5)])
def test_a_mask_of_a_part_of_a_series_with_a_gap_marks_that_part(drawn: slice, tmp_path: Path):
    left = [0, 1, 3, 4]
    series = volume(VOLUME, origin=(0.0, 0.0, -5.0 * drawn.start))
    put(tmp_path, [series[number] for number in left])
    nifti(tmp_path, "mask.nii.gz", CLASSES[:, :, drawn])
    _, masks, data = used(tmp_path)
    assert same(masks, MASKS[[number for number in left if drawn.start <= number < drawn.stop]])
    assert numbers(data) == [124]

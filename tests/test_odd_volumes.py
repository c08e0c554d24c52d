"""NIfTI volumes as other programs and old disks leave them."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel
import numpy as np
import pytest
from dicom_builders import MASKS, VOLUME, numbers, put, same, save, scaled, used, volume
from exports import BACKGROUND

from icmoe.study import Label

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


def test_a_file_of_two_axes_is_one_slice(tmp_path: Path):
    grey, marks = VOLUME[2].astype(np.int16), MASKS[2]
    for name, voxels in (("a.nii.gz", grey), ("a_seg.nii", marks)):
        (tmp_path / "export/Doe").mkdir(parents=True, exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(voxels, np.diag([-2.0, -1.0, 1.0, 1.0])), tmp_path / "export/Doe" / name)
    (picture,), (mask,), _ = used(tmp_path)
    assert int(mask.sum()) == int(marks.sum())
    assert sorted(picture.shape) == sorted(grey.shape)
    assert np.array_equal(np.sort(picture[mask > 0]), np.sort(scaled([grey])[0][marks > 0]))


@pytest.mark.parametrize("black", ["imagesTs/P1_0001.nii.gz", "P1/flair.nii.gz", "P1/P1_flair.nii.gz"])
def test_a_black_channel_is_no_mask_that_says_there_is_nothing(black: str, tmp_path: Path):
    nifti(tmp_path, black.replace("0001", "0000").replace("flair", "t1"), VOXELS)
    nifti(tmp_path, black, np.zeros_like(VOXELS))
    data = used(tmp_path)[2]
    assert not data.slices
    assert {fault.number for fault in data.exclusions} == {124, 108}


@pytest.mark.parametrize("mask", ["P1/lesion.nii.gz", "P1/t1_seg.nii.gz", "masks/P1/t1.nii.gz"])
def test_a_mask_without_a_mark_still_says_that_there_is_nothing(mask: str, tmp_path: Path):
    nifti(tmp_path, "P1/t1.nii.gz", VOXELS)
    nifti(tmp_path, mask, np.zeros_like(CLASSES))
    assert len(used(tmp_path)[2].slices) == len(VOLUME)


@pytest.mark.parametrize(
    ("head", "form"),
    [(b"ObjectType = Image\nNDims = 3\n", "MetaImage"), (b"NRRD0005\ntype: short\n", "NRRD"), (b"\x5c\x01\0\0", "Analyze")],
)
def test_a_volume_in_a_form_that_is_not_read_is_named(head: bytes, form: str, tmp_path: Path):
    nifti(tmp_path, "P1/t1.nii.gz", VOXELS)
    nifti(tmp_path, "P1/t1_seg.nii.gz", CLASSES)
    (tmp_path / "export/P1/t2").write_bytes(head + bytes(2000))
    data = used(tmp_path)[2]
    assert len(data.slices) == len(VOLUME)
    ((number, why),) = [(fault.number, fault.what) for fault in data.exclusions]
    assert number == 116
    assert why.startswith(f"a file in {form}")
    assert why.endswith("save it as NIfTI")


@pytest.mark.parametrize("order", [(2, 1, 0), (1, 0, 2)])
@pytest.mark.parametrize("dicom", [False, True])
def test_a_mask_whose_axes_were_exchanged_is_refused(order: tuple[int, ...], dicom: bool, tmp_path: Path):
    """SimpleITK's arrays have the slices first; saved with the image's matrix, marks lie inside it and elsewhere."""
    if dicom:
        put(tmp_path, volume(VOLUME, PatientID="a"), "a/{}")
        matrix = np.diag([-1.5, -1.0, 5.0, 1.0])
        matrix[:3, 3] = 20.0, 30.0, 40.0
        nibabel.save(nibabel.Nifti1Image(CLASSES.transpose(order), matrix), tmp_path / "export/a/m.nii.gz")
    else:
        nifti(tmp_path, "imagesTr/a.nii.gz", VOXELS)
        nifti(tmp_path, "labelsTr/a.nii.gz", CLASSES.transpose(order))
    data = used(tmp_path)[2]
    assert not data.slices
    assert 105 in numbers(data)


@pytest.mark.parametrize(
    ("shift", "slices", "is_used"), [((0, 0, 0), 5, True), ((0, 0, 0), 4, True), ((1, 0, 0), 5, False), ((0, 0, 1), 5, False)]
)
def test_a_mask_of_the_extents_of_its_image_that_lies_beside_it_is_refused(
    shift: tuple[int, int, int], slices: int, is_used: bool, tmp_path: Path
):
    """As where a program took the origin from LPS to RAS twice; a part of the image's extents may be all that was drawn on."""
    nifti(tmp_path, "imagesTr/a.nii.gz", VOXELS)
    matrix = AXES.copy()
    matrix[:3, 3] += AXES[:3, :3] @ shift
    (tmp_path / "export/labelsTr").mkdir()
    nibabel.save(nibabel.Nifti1Image(CLASSES[..., :slices], matrix), tmp_path / "export/labelsTr/a.nii.gz")
    data = used(tmp_path)[2]
    assert len(data.slices) == (slices if is_used else 0)
    assert (121 in numbers(data)) is not is_used


@pytest.mark.parametrize(("mask", "is_used"), [
    ("case1_liver.nii.gz", False),
    ("case1_left_kidney.nii.gz", False),
    ("liver/case1.nii.gz", False),
    ("case1_seg.nii.gz", True),
    ("case1_final.nii.gz", True),
])  # fmt: skip
def test_the_mask_of_an_organ_is_not_what_the_study_calls_one(mask: str, is_used: bool, tmp_path: Path):
    nifti(tmp_path, "case1.nii.gz", VOXELS)
    nifti(tmp_path, mask, CLASSES)
    data = used(tmp_path)[2]
    assert bool(data.slices) == is_used
    assert (120 in numbers(data)) != is_used


@pytest.mark.parametrize(
    ("head", "form"), [(b"PK\x03\x04", "zip"), (b"7z\xbc\xaf\x27\x1c", "7-Zip"), (b"", "gzip"), (b"tar", "tar")]
)
def test_an_archive_of_a_study_is_named(head: bytes, form: str, tmp_path: Path):
    nifti(tmp_path, "P1/t1.nii.gz", VOXELS)
    nifti(tmp_path, "P1/t1_seg.nii.gz", CLASSES)
    source = save(volume(VOLUME[:1])[0], tmp_path / "export/x").read_bytes()
    (tmp_path / "export/x").unlink()
    packed = {"gzip": gzip.compress(source), "tar": bytes(257) + b"ustar" + source}.get(form, head + source)
    (tmp_path / "export/study").write_bytes(packed)
    ((number, why),) = [(fault.number, fault.what) for fault in used(tmp_path)[2].exclusions]
    assert number == 116
    assert f"({form})" in why
    assert why.endswith("unpack it")


@pytest.mark.parametrize(("images", "marked"), [
    ("p1_t1 p1_flair", 2),
    ("p1_t1 p1_followup_t1", 1),
    ("p1_t1 p1_2_t1", 1),
    ("p1_t1 p1_t1_visit2", 1),
    ("p1_flair p1_20200101_flair", 1),
    ("p1_20200101_t1 p1_20200101_flair", 2),
    ("p1_20200101_t1 p1_20210101_t1", 0),
])  # fmt: skip
def test_a_mask_beside_volumes_of_several_visits_marks_those_of_its_own(images: str, marked: int, tmp_path: Path):
    """In one folder a mask is of all volumes that go on from its name, as X_seg is of X_t1 and X_perfusion."""
    for seed, name in enumerate(images.split()):
        grey = np.random.default_rng(seed).integers(0, 3000, VOXELS.shape).astype(np.int16)
        nifti(tmp_path, f"{name}.nii.gz", grey)
    nifti(tmp_path, "p1_seg.nii.gz", CLASSES)
    assert len(used(tmp_path)[2].slices) == marked * len(VOLUME)


@pytest.mark.parametrize(("mask", "value", "classes"), [
    ("case1_edema", 1, {0, 2}),
    ("case1_edema", 2, {0, 2}),
    ("case1_lesion", 2, set()),
    ("lesion/case1", 2, {0, 2}),
])  # fmt: skip
def test_a_mask_called_like_one_class_with_the_value_of_another_is_refused(
    mask: str, value: int, classes: set[int], tmp_path: Path
):
    """A folder of label maps may be called like one of their classes."""
    nifti(tmp_path, "case1.nii.gz", VOXELS)
    nifti(tmp_path, f"{mask}.nii.gz", CLASSES * np.uint8(value))
    labels = (BACKGROUND, Label(name="lesion", values=(1,)), Label(name="edema", values=(2,)))
    _, masks, data = used(tmp_path, labels)
    assert {int(one) for mask in masks for one in np.unique(mask)} == classes
    assert (106 in numbers(data)) is not bool(classes)

"""Masks of every form, and all the ways in which they say what they belong to, compared with what was drawn."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from dicom_builders import (
    MASKS,
    RNG,
    VOLUME,
    common,
    contour,
    derived,
    enhanced,
    image,
    item,
    lying,
    numbers,
    place,
    plain_segmentation,
    put,
    same,
    scaled,
    segmentation,
    structures,
    used,
    volume,
)
from exports import BACKGROUND
from pydicom.dataset import Dataset
from pydicom.uid import (
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
)

from icmoe.study import Label

pytestmark = pytest.mark.usefixtures("in_this_process")


def test_a_sparse_mask_of_an_enhanced_volume_says_that_the_other_slices_are_empty(tmp_path: Path):
    source = enhanced(VOLUME, [place((0, 0, 5.0 * n), stack=n + 1) for n in range(5)], common())
    put(tmp_path, [source, segmentation([source], MASKS, "BINARY", omit_empty_frames=True)])
    assert same(used(tmp_path)[1], MASKS)


TWO = (BACKGROUND, Label(name="lesion", values=(1,)), Label(name="edema", values=(2,)))
BOTH = np.stack([MASKS, np.roll(MASKS, 4, axis=2)], axis=-1)


@pytest.mark.parametrize(
    ("kind", "further"),
    [
        ("BINARY", {}),
        ("BINARY", {"omit_empty_frames": False}),
        ("FRACTIONAL", {}),
        ("FRACTIONAL", {"fractional_type": "OCCUPANCY", "max_fractional_value": 10}),
        ("FRACTIONAL", {"transfer_syntax_uid": RLELossless}),
        ("FRACTIONAL", {"transfer_syntax_uid": JPEG2000Lossless}),
    ],
)
def test_overlapping_segments_give_the_higher_class_and_unknown_ones_nothing(kind: str, further: dict[str, Any], tmp_path: Path):
    sources = volume(VOLUME.repeat(2, axis=1).repeat(2, axis=2))
    stack = np.concatenate([BOTH, np.ones_like(MASKS)[..., None]], axis=-1).repeat(2, axis=1).repeat(2, axis=2)
    values = np.where(stack, 0.55, 0.4) if kind == "FRACTIONAL" else stack
    put(tmp_path, [*sources, segmentation(sources, values, kind, ("Lesion", "EDEMA", "bone"), **further)])
    want = np.where(stack[..., 1], 2, stack[..., 0])
    assert same(used(tmp_path, TWO)[1], want)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, RLELossless])
def test_label_maps_mean_the_segment_of_their_value(syntax: str, tmp_path: Path):
    sources = volume(VOLUME)
    labelled = np.where(BOTH[..., 1], 3, BOTH[..., 0]).astype(np.uint8)
    labelled[:, 0, 0] = 2
    made = segmentation(sources, labelled, "LABELMAP", ("lesion", "bone", "edema"), transfer_syntax_uid=syntax)
    put(tmp_path, [*sources, made])
    want = np.where(labelled == 3, 2, labelled == 1)
    assert same(used(tmp_path, TWO)[1], want)


def referring(case: str, sources: Sequence[Dataset]) -> Dataset:
    """Return a SEG object of `MASKS` that says in one of several ways what it belongs to."""
    places = [lying(one.ImagePositionPatient) for one in sources]
    references = [derived(one).SourceImageSequence[0] for one in sources]
    listed = [item(SeriesInstanceUID=sources[0].SeriesInstanceUID, ReferencedInstanceSequence=references)]
    space = sources[0].FrameOfReferenceUID
    made = plain_segmentation(MASKS, places, SharedFunctionalGroupsSequence=[common()], FrameOfReferenceUID=space)
    if case == "by frame":
        for own, one in zip(places, sources, strict=True):
            own.DerivationImageSequence = [derived(one)]
    elif case == "as a list":
        made.ReferencedSeriesSequence = listed
    elif case == "in another study":
        made.StudiesContainingOtherReferencedInstancesSequence = [
            item(StudyInstanceUID=sources[0].StudyInstanceUID, ReferencedSeriesSequence=listed)
        ]
        made.FrameOfReferenceUID = "1.2.3"
    elif case == "shared":
        made.SharedFunctionalGroupsSequence[0].DerivationImageSequence = [item(SourceImageSequence=references)]
    elif case == "all by each":
        for own in places:
            own.DerivationImageSequence = [item(SourceImageSequence=references)]
    return made


@pytest.mark.parametrize("case", ["by frame", "as a list", "in another study", "by place", "shared", "all by each"])
def test_a_mask_finds_its_images_however_it_refers_to_them(case: str, tmp_path: Path):
    sources = volume(VOLUME)
    put(tmp_path, [*sources, referring(case, sources)])
    pictures, classes, _ = used(tmp_path)
    assert same(pictures, scaled(VOLUME))
    assert same(classes, MASKS)


def test_a_mask_that_lists_images_in_other_planes_makes_none_of_them_background(tmp_path: Path):
    sources = volume(VOLUME)
    mask = referring("as a list", sources)
    for own in mask.PerFrameFunctionalGroupsSequence:
        own.PlanePositionSequence[0].ImagePositionPatient[2] += 2.5
    put(tmp_path, [*sources, mask])
    assert not used(tmp_path)[0]
    assert 121 in numbers(used(tmp_path)[2])


def test_a_mask_of_another_patient_is_refused(tmp_path: Path):
    sources = volume(VOLUME)
    mask = referring("by frame", sources)
    mask.PatientID = "Roe 2"
    put(tmp_path, [*sources, mask])
    assert numbers(used(tmp_path)[2])[:2] == [108, 121]


def test_a_frame_derived_from_several_frames_marks_each_of_them(tmp_path: Path):
    source = enhanced(VOLUME[:4], [place((0, 0, 0), time=t + 1) for t in range(4)], common())
    put(tmp_path, [source, plain_segmentation(MASKS[2:3], [item(DerivationImageSequence=[derived(source, 2, 4)])])])
    pictures, classes, data = used(tmp_path)
    assert same(classes, [MASKS[2], MASKS[2]])
    assert same(pictures, scaled(VOLUME[[1, 3]]))
    assert 124 in numbers(data), "a later look at the same place is not background because another was marked"


def on(source: Dataset, position: Sequence[float]) -> Dataset:
    own = lying(position)
    own.DerivationImageSequence = [derived(source)]
    return own


GRIDS = {
    "part of the image": (lambda m: m[:, 2:16, 3:24], lambda p: [p[0] + 3 * 1.5, p[1] + 2 * 1.0, p[2]], (1.0, 1.5)),
    "finer": (lambda m: m.repeat(3, axis=1).repeat(3, axis=2), lambda p: [p[0] - 0.5, p[1] - 1 / 3, p[2]], (1 / 3, 0.5)),
    "larger": (lambda m: np.pad(m, ((0, 0), (4, 4), (4, 4))), lambda p: [p[0] - 6.0, p[1] - 4.0, p[2]], (1.0, 1.5)),
}


@pytest.mark.parametrize("name", GRIDS)
def test_a_mask_on_another_grid_that_meets_the_pixels_is_taken_over(name: str, tmp_path: Path):
    change, where, spacing = GRIDS[name]
    sources = volume(VOLUME)
    groups = [
        item(
            DerivationImageSequence=[derived(one)],
            PlanePositionSequence=[item(ImagePositionPatient=where(list(map(float, one.ImagePositionPatient))))],
        )
        for one in sources
    ]
    put(tmp_path, [*sources, plain_segmentation(change(MASKS), groups, SharedFunctionalGroupsSequence=[common(spacing=spacing)])])
    assert same(used(tmp_path)[1], MASKS)


def test_a_mask_mostly_beside_its_image_is_refused(tmp_path: Path):
    sources = volume(VOLUME[:2])
    marked = np.zeros((2, 20, 24), np.uint8)
    marked[:, :, :6], marked[:, :2, 18:] = 1, 1
    groups = [
        item(
            DerivationImageSequence=[derived(one)],
            PlanePositionSequence=[
                item(ImagePositionPatient=[float(one.ImagePositionPatient[0]) - 15.0, *one.ImagePositionPatient[1:]])
            ],
        )
        for one in sources
    ]
    put(tmp_path, [*sources, plain_segmentation(marked, groups, SharedFunctionalGroupsSequence=[common()])])
    assert 121 in numbers(used(tmp_path)[2])


def test_two_readers_of_one_lesion_are_told_apart_from_two_lesions_and_from_copies(tmp_path: Path):
    sources = volume(VOLUME)
    other, apart = np.roll(MASKS, 1, axis=2), np.zeros_like(MASKS)
    apart[2, 17:, 20:] = 1
    for name, second, want in (("reader", other, None), ("lesion", apart, MASKS | apart), ("copy", MASKS, MASKS)):
        put(tmp_path / name, [*sources, segmentation(sources, MASKS, "BINARY"), segmentation(sources, second, "BINARY")])
        _, classes, data = used(tmp_path / name)
        assert same(classes, want if want is not None else [])
        assert (122 in numbers(data)) == (want is None)


def square(source: Dataset, top: float, left: float, bottom: float, right: float, above_mm: float = 0.0) -> np.ndarray:
    """Return the corners of a box in patient coordinates, given in pixels of the image."""
    axes, spacing = np.asarray(source.ImageOrientationPatient, float), source.PixelSpacing
    corners = [(top, left), (top, right), (bottom, right), (bottom, left)]
    start = np.asarray(source.ImagePositionPatient, float) + above_mm * np.cross(axes[:3], axes[3:])
    return np.asarray([start + row * spacing[0] * axes[3:] + column * spacing[1] * axes[:3] for row, column in corners])


OBLIQUE = (0.8, 0.6, 0, -0.6, 0.8, 0)


@pytest.mark.parametrize("axes", [(1, 0, 0, 0, 1, 0), OBLIQUE])
@pytest.mark.parametrize("refers", ["by contour", "as a list", "by place"])
def test_contours_fill_the_pixels_whose_centres_they_enclose(refers: str, axes: tuple[float, ...], tmp_path: Path):
    sources = volume(VOLUME, axes=axes)
    outer, inner, beside = ((2.4, 3.4, 12.6, 15.6), (5.6, 6.6, 8.4, 9.4), (14.5, 17.5, 17.5, 20.5))
    drawn = [(source, box) for source in sources[1:3] for box in (outer, inner, beside)]
    contours = [contour(square(source, *box), source if refers == "by contour" else None) for source, box in drawn]
    contours += [
        contour(square(sources[1], 0, 0, 9, 9), kind="OPEN_PLANAR"),
        contour(square(sources[1], 0, 0, 9, 9)[:1], kind="POINT"),
    ]
    space = sources[0].FrameOfReferenceUID
    put(tmp_path, [*sources, structures(contours, listed=sources if refers == "as a list" else (), space=space, name=" LESION ")])
    want = np.zeros((20, 24), np.uint8)
    want[3:13, 4:16], want[15:18, 18:21] = 1, 1
    want[6:9, 7:10] = 0
    _, classes, data = used(tmp_path)
    empty = np.zeros_like(want)
    assert same(classes, [empty, want, want, empty, empty] if refers == "as a list" else [want, want])
    assert (124 in numbers(data)) == (refers != "as a list")


def test_a_keyhole_leaves_its_hole(tmp_path: Path):
    sources = volume(VOLUME[:1])
    outer, inner = square(sources[0], 2.4, 3.4, 12.6, 15.6), square(sources[0], 5.6, 6.6, 8.4, 9.4)
    path = np.concatenate([outer, outer[:1], inner[::-1], inner[-1:]])
    put(tmp_path, [*sources, structures([contour(path, sources[0])], space=sources[0].FrameOfReferenceUID)])
    want = np.zeros((20, 24), np.uint8)
    want[3:13, 4:16] = 1
    want[6:9, 7:10] = 0
    ((found,),) = (used(tmp_path)[1],)
    assert np.count_nonzero(found != want) <= 3, "pixels under the slit may fall to either side"


def test_an_image_without_a_place_that_a_structure_set_lists_is_background(tmp_path: Path):
    sources = [*volume(VOLUME[:2]), image(VOLUME[2])]
    drawn = contour(square(sources[0], 2.4, 3.4, 12.6, 15.6), sources[0])
    put(tmp_path, [*sources, structures([drawn], listed=sources)])
    _, classes, data = used(tmp_path)
    assert sorted(int(one.sum()) for one in classes) == [0, 0, 120]
    assert 104 not in numbers(data)


def test_a_contour_off_the_plane_of_its_image_is_refused(tmp_path: Path):
    sources = volume(VOLUME[:1])
    off = contour(square(sources[0], 2, 3, 9, 9, above_mm=2.0), sources[0])
    put(tmp_path, [*sources, structures([off], space=sources[0].FrameOfReferenceUID)])
    assert 121 in numbers(used(tmp_path)[2])


def as_nifti(masks: np.ndarray, order: Sequence[int], flips: Sequence[int], kind: Any = np.uint8) -> nibabel.Nifti1Image:
    """Return slices x H x W of a default axial `volume` with its axes in another order and direction, and the affine for it."""
    lps = np.asarray([[0, 0, 1.5, -20], [0, 1.0, 0, -30], [5.0, 0, 0, 40], [0, 0, 0, 1]])
    voxels, affine = masks, np.diag([-1, -1, 1, 1]) @ lps
    for axis in flips:
        step = np.eye(4)
        step[axis, axis], step[axis, 3] = -1, voxels.shape[axis] - 1
        voxels, affine = np.flip(voxels, axis), affine @ step
    return nibabel.Nifti1Image(voxels.transpose(order).astype(kind), affine[:, [*order, 3]])


FORMS = [(order, flips) for order in permutations(range(3)) for flips in ([], [0], [1, 2])]


@pytest.mark.parametrize(("order", "flips"), FORMS)
def test_a_nifti_mask_lies_where_its_affine_says(order: tuple[int, ...], flips: list[int], tmp_path: Path):
    sources = volume(VOLUME)
    put(tmp_path, sources)
    nibabel.save(as_nifti(MASKS, order, flips), tmp_path / "export/m.nii.gz")
    pictures, classes, _ = used(tmp_path)
    assert same(pictures, scaled(VOLUME))
    assert same(classes, MASKS)


@pytest.mark.parametrize("form", ["float", "scaled", "four axes", "qform alone", "larger", "one slice fewer"])
def test_nifti_masks_of_other_forms(form: str, tmp_path: Path):
    sources, want = volume(VOLUME), MASKS
    put(tmp_path, sources)
    made = as_nifti(MASKS, (2, 1, 0), [], np.float32 if form == "float" else np.uint8)
    if form == "scaled":
        made = nibabel.Nifti1Image(np.asarray(made.dataobj) * 255, made.affine)
        made.header.set_slope_inter(1 / 255, 0)
    elif form == "four axes":
        made = nibabel.Nifti1Image(np.asarray(made.dataobj)[..., None], made.affine)
    elif form == "qform alone":
        made.set_qform(made.affine, 1)
        made.set_sform(None, 0)
    elif form == "larger":
        affine = made.affine @ np.asarray([[1, 0, 0, -3], [0, 1, 0, -2], [0, 0, 1, -1], [0, 0, 0, 1.0]])
        made = nibabel.Nifti1Image(np.pad(np.asarray(made.dataobj), ((3, 3), (2, 2), (1, 1))), affine)
    elif form == "one slice fewer":
        made, want = as_nifti(MASKS[:4], (2, 1, 0), []), MASKS[:4]
    nibabel.save(made, tmp_path / "export/m.nii")
    assert same(used(tmp_path)[1], want)


def test_a_nifti_mask_off_the_grid_or_off_the_slices_is_refused(tmp_path: Path):
    put(tmp_path, volume(VOLUME[:2]))
    shifted = as_nifti(MASKS, (2, 1, 0), [])
    shifted.affine[0, 3] += 0.7
    nibabel.save(nibabel.Nifti1Image(np.asarray(shifted.dataobj), shifted.affine), tmp_path / "export/a.nii.gz")
    assert numbers(used(tmp_path)[2]) == [108, 121, 124]
    (tmp_path / "export/a.nii.gz").unlink()
    nibabel.save(as_nifti(MASKS, (2, 1, 0), []), tmp_path / "export/b.nii.gz")
    assert 121 in numbers(used(tmp_path)[2]), "slices 2 and 3 of the mask have most of it and no image"


def test_nnunet_cases_of_equal_geometry_pair_by_name_and_their_channels_are_one_patient(tmp_path: Path):
    for folder in ("imagesTr", "labelsTr"):
        (tmp_path / "export" / folder).mkdir(parents=True)
    for number in range(3):
        for channel in range(2):
            grey = VOLUME + RNG.integers(0, 99, VOLUME.shape)
            nibabel.save(as_nifti(grey, (2, 1, 0), [], np.int16), tmp_path / f"export/imagesTr/case{number}_{channel:04}.nii.gz")
        nibabel.save(as_nifti(np.roll(MASKS, number, 2), (2, 1, 0), []), tmp_path / f"export/labelsTr/case{number}.nii.gz")
    data = used(tmp_path)[2]
    assert len({one.patient for one in data.slices}) == 3
    assert len(data.slices) == 3 * 2 * 5
    assert not data.exclusions


def test_bids_masks_pair_by_subject_and_sessions_are_one_patient(tmp_path: Path):
    for number in (1, 2):
        for session in ("a", "b"):
            inside = f"sub-0{number}/ses-{session}/anat"
            for folder in ("raw", "derivatives/lesions"):
                (tmp_path / "export" / folder / inside).mkdir(parents=True)
            name = f"{inside}/sub-0{number}_ses-{session}"
            grey = VOLUME + RNG.integers(0, 99, VOLUME.shape)
            nibabel.save(as_nifti(grey, (2, 1, 0), [], np.int16), tmp_path / f"export/raw/{name}_FLAIR.nii.gz")
            nibabel.save(as_nifti(MASKS, (2, 1, 0), []), tmp_path / f"export/derivatives/lesions/{name}_mask.nii.gz")
    data = used(tmp_path)[2]
    assert len({one.patient for one in data.slices}) == 2
    assert len(data.slices) == 4 * 5

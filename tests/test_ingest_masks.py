"""Masks of every form, and all the ways in which they say what they belong to, compared with what was drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dicom_builders import (
    MASKS,
    VOLUME,
    common,
    derived,
    enhanced,
    item,
    lying,
    numbers,
    place,
    plain_segmentation,
    put,
    same,
    scaled,
    segmentation,
    used,
    volume,
)
from pydicom.dataset import Dataset
from pydicom.uid import (
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
)
from test_ingest import BACKGROUND

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
    shared = common()
    listed = [
        item(
            SeriesInstanceUID=sources[0].SeriesInstanceUID,
            ReferencedInstanceSequence=[derived(one).SourceImageSequence[0] for one in sources],
        )
    ]
    made = plain_segmentation(
        MASKS, places, SharedFunctionalGroupsSequence=[shared], FrameOfReferenceUID=sources[0].FrameOfReferenceUID
    )
    if case == "by frame":
        for own, one in zip(places, sources, strict=True):
            own.DerivationImageSequence = [derived(one)]
    elif case == "as a list":
        made.ReferencedSeriesSequence = listed
    return made


@pytest.mark.parametrize("case", ["by frame", "as a list", "by place"])
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

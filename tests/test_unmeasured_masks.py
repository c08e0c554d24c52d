"""SEG objects that say but a part of where their pixels lie, or on which image: by that they are laid, or refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from dicom_builders import MASKS, VOLUME, common, derived, item, lying, numbers, plain_segmentation, put, same, used, volume
from pydicom.dataset import Dataset

pytestmark = pytest.mark.usefixtures("in_this_process")
AXIAL, TURNED, TRANSPOSED = (1, 0, 0, 0, 1, 0), (-1, 0, 0, 0, -1, 0), (0, 1, 0, 1, 0, 0)
CORNER = np.asarray([-20.0 + 23 * 1.5, -30.0 + 19 * 1.0, 0.0])


def marks(sources: list[Dataset], masks: np.ndarray, axes: tuple[int, ...], start: object, mm: tuple[float, ...] = ()) -> Dataset:
    """Return a SEG derived from its sources that begins at `start` in each plane; None where no frame says that."""
    groups = [item(DerivationImageSequence=[derived(source)]) for source in sources]
    for group, source in zip(groups, sources, strict=True):
        if start is not None:
            where = [*np.asarray(start, dtype=float)[:2], float(source.ImagePositionPatient[2])]
            group.PlanePositionSequence = [item(ImagePositionPatient=where)]
        if mm:
            group.PixelMeasuresSequence = [item(PixelSpacing=list(mm))]
    shared = item(PlaneOrientationSequence=[item(ImageOrientationPatient=list(axes))])
    return plain_segmentation(masks, groups, PatientID="Doe 1", SharedFunctionalGroupsSequence=[shared])


@pytest.mark.parametrize("known", ["image", "mask", "neither"])
@pytest.mark.parametrize("way", ["alike", "turned", "transposed"])
def test_a_mask_without_distances_is_laid_by_its_directions(known: str, way: str, tmp_path: Path):
    sources = volume(VOLUME)
    if known != "image":
        for source in sources:
            del source.PixelSpacing
    axes = {"alike": AXIAL, "turned": TURNED, "transposed": TRANSPOSED}[way]
    masks = {"alike": MASKS, "turned": MASKS[:, ::-1, ::-1], "transposed": MASKS.transpose(0, 2, 1)}[way]
    mm = ((1.0, 1.5) if way != "transposed" else (1.5, 1.0)) if known == "mask" else ()
    made = marks(sources, np.ascontiguousarray(masks), axes, CORNER if way == "turned" else (-20.0, -30.0), mm)
    put(tmp_path, [*sources, made])
    _, found, data = used(tmp_path)
    laid = way == "alike" or known != "neither"
    assert same(found, MASKS if laid else [])
    assert bool({121, 105} & {*numbers(data)}) is not laid


@pytest.mark.parametrize("start", [(-20.0, -30.0), None])
def test_a_mask_that_is_turned_where_it_lies_is_refused(start: object, tmp_path: Path):
    sources = volume(VOLUME)
    put(tmp_path, [*sources, marks(sources, MASKS, TURNED, start)])
    _, found, data = used(tmp_path)
    assert not any(classes.any() for classes in found)
    assert 121 in numbers(data)


def test_a_mask_that_says_its_directions_alone_lies_pixel_by_pixel(tmp_path: Path):
    sources = volume(VOLUME)
    put(tmp_path, [*sources, marks(sources, MASKS, AXIAL, None)])
    assert same(used(tmp_path)[1], MASKS)


@pytest.mark.parametrize("ct_too", [True, False])
def test_a_mask_that_lists_a_dynamic_series_beside_its_own_marks_its_own(ct_too: bool, tmp_path: Path):
    ct = volume(VOLUME)
    shared = {name: ct[0][name].value for name in ("FrameOfReferenceUID", "StudyInstanceUID")}
    first = volume(VOLUME[::-1], Modality="PT", **shared)
    later = volume(VOLUME // 2 + 9, Modality="PT", SeriesInstanceUID=first[0].SeriesInstanceUID, **shared)
    listed = [item(ReferencedSOPInstanceUID=one.SOPInstanceUID) for one in [*ct, *first, *later]]
    made = plain_segmentation(
        MASKS[1:4],
        [lying(ct[n].ImagePositionPatient) for n in (1, 2, 3)],
        SharedFunctionalGroupsSequence=[common()],
        ReferencedSeriesSequence=[item(SeriesInstanceUID=ct[0].SeriesInstanceUID, ReferencedInstanceSequence=listed)],
        **shared,
    )
    put(tmp_path, [*(ct if ct_too else []), *first, *later, made])
    _, masks, data = used(tmp_path)
    assert same(masks, MASKS if ct_too else [])
    assert numbers(data) == ([124] if ct_too else [108, 122, 124])

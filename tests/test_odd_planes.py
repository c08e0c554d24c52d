"""Places that other systems write otherwise than ours: slices thinner than a millimetre, series of several grids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from dicom_builders import (
    MASKS,
    VOLUME,
    common,
    contour,
    derived,
    enhanced,
    item,
    lying,
    numbers,
    place,
    plain_segmentation,
    put,
    same,
    structures,
    used,
    volume,
)
from pydicom.dataset import Dataset
from test_ingest_masks import square

from icmoe.data.ingest.nearest import nearest
from icmoe.data.ingest.records import Plane

pytestmark = pytest.mark.usefixtures("in_this_process")
THIN_MM = 0.4


def thin(**elements: object) -> list[Dataset]:
    return volume(VOLUME, step=(0, 0, THIN_MM), **elements)


def boxes(sources: list[Dataset], up_mm: float = 0.0) -> list[Dataset]:
    """Return a contour on each of the slices 1 to 3, each smaller than the one below it, that names no image."""
    found = [contour(square(sources[n], 2.4, 3.4, 14.6 - n, 15.6 - n)) for n in (1, 2, 3)]
    for made in found:
        points = np.asarray(made.ContourData, dtype=float).reshape(-1, 3) + np.asarray([0.0, 0.0, up_mm])
        made.ContourData = [round(float(value), 6) for value in points.ravel()]
    return found


def filled() -> list[np.ndarray]:
    want = [np.zeros((20, 24), np.uint8) for _ in range(3)]
    for n, mask in enumerate(want, start=1):
        mask[3 : 15 - n, 4 : 16 - n] = 1
    return want


@pytest.mark.parametrize("up_mm", [0.0, 0.1, -0.15, -0.2])
@pytest.mark.parametrize("listed", [True, False])
def test_of_slices_thinner_than_the_tolerance_a_contour_marks_the_nearest_alone(listed: bool, up_mm: float, tmp_path: Path):
    sources = thin()
    made = structures(boxes(sources, up_mm), listed=sources if listed else (), space=sources[0].FrameOfReferenceUID)
    put(tmp_path, [*sources, made])
    _, masks, data = used(tmp_path)
    assert same([mask for mask in masks if mask.any()], filled())
    assert set(numbers(data)) <= {124}


@pytest.mark.parametrize("named", ["none", "listed", "all"])
def test_of_slices_thinner_than_the_tolerance_a_frame_of_a_segmentation_marks_the_nearest_alone(named: str, tmp_path: Path):
    sources = thin()
    groups = [lying(sources[n].ImagePositionPatient) for n in (1, 2, 3)]
    further = {name: sources[0][name].value for name in ("FrameOfReferenceUID", "StudyInstanceUID")}
    if named == "listed":
        references = [item(ReferencedSOPInstanceUID=one.SOPInstanceUID) for one in sources]
        further["ReferencedSeriesSequence"] = [item(ReferencedInstanceSequence=references)]
    if named == "all":
        for group in groups:
            group.DerivationImageSequence = [derived(one) for one in sources]
    put(tmp_path, [*sources, plain_segmentation(MASKS[1:4], groups, SharedFunctionalGroupsSequence=[common()], **further)])
    _, masks, data = used(tmp_path)
    assert same(masks, MASKS[1:4])
    assert numbers(data) == [124]


def test_each_series_has_an_image_that_is_nearest(tmp_path: Path):
    """A frame of a segmentation lies on a second series too that is listed, has its grid and lies a little higher."""
    sources = thin()
    shared = {name: sources[0][name].value for name in ("FrameOfReferenceUID", "StudyInstanceUID")}
    other = thin(**shared)
    for one in other:
        one.PixelData = (VOLUME[one.InstanceNumber - 1][::-1] + 1).tobytes()
        one.ImagePositionPatient = [*one.ImagePositionPatient[:2], one.ImagePositionPatient[2] + 0.05]
    references = [item(ReferencedSOPInstanceUID=one.SOPInstanceUID) for one in (*sources, *other)]
    further = {**shared, "ReferencedSeriesSequence": [item(ReferencedInstanceSequence=references)]}
    groups = [lying(sources[n].ImagePositionPatient) for n in (1, 2, 3)]
    put(
        tmp_path, [*sources, *other, plain_segmentation(MASKS[1:4], groups, SharedFunctionalGroupsSequence=[common()], **further)]
    )
    _, masks, _ = used(tmp_path)
    assert sorted(int(mask.sum()) for mask in masks) == sorted(2 * [int(mask.sum()) for mask in MASKS[1:4]])


def two_phases(*, as_one: bool) -> list[Dataset]:
    """Return a series that shows each of five places twice, as one enhanced object or as ten files."""
    greys = np.concatenate([VOLUME, VOLUME[:, ::-1] + 1])
    places = [(-20.0, -30.0, 40.0 + 5.0 * (n % 5)) for n in range(10)]
    if as_one:
        return [enhanced(greys, [place(at, stack=n % 5 + 1, time=n // 5 + 1) for n, at in enumerate(places)], common())]
    first = volume(VOLUME)
    shared = {name: first[0][name].value for name in ("SeriesInstanceUID", "FrameOfReferenceUID", "StudyInstanceUID")}
    return [*first, *volume(greys[5:], AcquisitionNumber=2, **shared)]


@pytest.mark.parametrize("form", ["seg", "contours"])
@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("as_one", [True, False])
def test_a_mark_that_names_no_phase_of_its_series_marks_none(as_one: bool, named: bool, form: str, tmp_path: Path):
    """A file that names one of ten is of that; an enhanced object that is named as a whole is both of its phases."""
    sources = two_phases(as_one=as_one)
    drawn_on = sources * 5 if as_one else sources
    if form == "seg":
        groups = [lying((-20.0, -30.0, 40.0 + 5.0 * n)) for n in (1, 2, 3)]
        for n, group in zip((1, 2, 3), groups, strict=True):
            if named:
                group.DerivationImageSequence = [derived(drawn_on[n])]
        references = [item(ReferencedSOPInstanceUID=one.SOPInstanceUID) for one in sources]
        further = {name: sources[0][name].value for name in ("FrameOfReferenceUID", "StudyInstanceUID")}
        further["ReferencedSeriesSequence"] = [item(ReferencedInstanceSequence=references)]
        made = plain_segmentation(MASKS[1:4], groups, SharedFunctionalGroupsSequence=[common()], **further)
    else:
        contours = [contour(square(one, 2.4, 3.4, 12.6, 15.6), one if named else None) for one in volume(VOLUME)[1:4]]
        for n, one in zip((1, 2, 3), contours, strict=True):
            if named:
                one.ContourImageSequence = [item(ReferencedSOPInstanceUID=drawn_on[n].SOPInstanceUID)]
        made = structures(contours, listed=sources, space=sources[0].FrameOfReferenceUID)
    put(tmp_path, [*sources, made])
    _, masks, data = used(tmp_path)
    assert sum(bool(mask.any()) for mask in masks) == (3 if named and not as_one else 0)
    assert (122 in numbers(data)) is not (named and not as_one)


@pytest.mark.parametrize("up_mm", [0.0, 0.1, -0.15])
def test_an_enhanced_object_of_thin_slices_that_is_named_as_a_whole_is_marked_on_the_nearest_alone(up_mm: float, tmp_path: Path):
    starts = [(-20.0, -30.0, 40.0 + THIN_MM * n) for n in range(5)]
    source = enhanced(VOLUME, [place(start, stack=n + 1) for n, start in enumerate(starts)], common())
    groups = [lying((*starts[n][:2], starts[n][2] + up_mm)) for n in (1, 2, 3)]
    for group in groups:
        group.DerivationImageSequence = [derived(source)]
    further = {name: source[name].value for name in ("FrameOfReferenceUID", "StudyInstanceUID")}
    put(tmp_path, [source, plain_segmentation(MASKS[1:4], groups, SharedFunctionalGroupsSequence=[common()], **further)])
    assert same(used(tmp_path)[1], MASKS[1:4])


@pytest.mark.parametrize("both", [True, False])
def test_a_segmentation_that_names_no_image_is_of_the_series_on_whose_grid_it_lies(both: bool, tmp_path: Path):
    """PET and CT of one visit share a frame of reference and, often, their planes, and have pixels of other sizes."""
    ct = volume(VOLUME)
    shared = {name: ct[0][name].value for name in ("FrameOfReferenceUID", "StudyInstanceUID")}
    pet = volume(VOLUME[:, ::2, ::2], spacing=(2.3, 3.1), Modality="PT", **shared)
    groups = [lying(ct[n].ImagePositionPatient) for n in (1, 2, 3)]
    made = plain_segmentation(MASKS[1:4], groups, SharedFunctionalGroupsSequence=[common()], **shared)
    put(tmp_path, [*(ct if both else []), *pet, made])
    _, masks, data = used(tmp_path)
    assert same(masks, MASKS[1:4] if both else [])
    assert numbers(data) == ([124, 124] if both else [108, 121, 124])


def shifted(sources: list[Dataset], n: int) -> None:
    sources[n].ImagePositionPatient = [sources[n].ImagePositionPatient[0] + 15.0, *sources[n].ImagePositionPatient[1:]]


def tilted(sources: list[Dataset], n: int) -> None:
    x, y, z = sources[n].ImagePositionPatient
    sources[n].ImagePositionPatient = [x, y + 1.25 * n, z]


@pytest.mark.parametrize(
    ("changed", "known"),
    [
        ({}, True),
        ({"PixelSpacing": [2.0, 3.0]}, False),
        ({"PixelSpacing": [1.0002, 1.5]}, True),
        ({"ImageOrientationPatient": [0, 1, 0, -1, 0, 0]}, False),
        (shifted, False),
        (tilted, True),
    ],
)
def test_slices_that_are_not_of_one_grid_have_no_distances(changed: object, known: bool, tmp_path: Path):
    """The field of view was changed within a series; surface distances over it would be of no place."""
    sources = volume(VOLUME)
    for n in (2, 3):
        for name, value in changed.items() if isinstance(changed, dict) else ():
            setattr(sources[n], name, value)
    for n in range(5) if changed is tilted else (3,):
        if callable(changed):
            changed(sources, n)
    groups = [item(DerivationImageSequence=[derived(sources[n])]) for n in (1, 2, 3)]
    put(tmp_path, [*sources, plain_segmentation(MASKS[1:4], groups)])
    found = {one.spacing_mm for one in used(tmp_path)[2].slices}
    assert found == {(5.0, 1.0, 1.5) if known else None}


def plane_at(height_mm: float, *, turned: bool = False) -> Plane:
    """Return an axial plane there; a turned one has its rows the other way, and so its normal points down."""
    return (0.0, 0.0, height_mm, -1.0 if turned else 1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0)


@pytest.mark.parametrize("turned", [[], [0], [1], [0, 1]])
def test_of_two_images_as_far_from_a_mark_one_side_has_it_whichever_way_each_image_is_turned(turned: list[int]):
    places = [(n, "a series", plane_at(0.4 * n, turned=n in turned)) for n in (0, 1)]
    up = 0 not in turned  # as the series' first image is turned
    assert nearest(plane_at(0.2), places) == [0 if up else 1]
    assert nearest(plane_at(0.3), places) == [1]
    assert nearest(plane_at(0.1), places) == [0]
    assert nearest(plane_at(0.2), [*places, (7, "another series", plane_at(0.45))]) == [0 if up else 1, 7]

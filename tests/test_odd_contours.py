"""Contours as systems draw them: through the centres of pixels, either way round, or around nothing."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from dicom_builders import VOLUME, contour, item, numbers, put, same, structures, used, volume
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.path import Path as Path2D
from pydicom.dataset import Dataset
from test_ingest_masks import square
from test_masks_apart import registered
from test_odd_masks import BOX, EMPTY, FILLED, drawn

from icmoe.data.ingest.filling import Filled, fill, joined
from icmoe.data.ingest.refusals import Refusal

pytestmark = pytest.mark.usefixtures("in_this_process")
SHAPE = (9, 9)
POLYGON = st.lists(st.tuples(st.integers(0, 16), st.integers(0, 16)), min_size=1, max_size=9)
"""Corners in half pixels."""


def filled(corners: Sequence[tuple[float, float]]) -> Filled:
    return fill(np.asarray(corners, float), SHAPE)


def lies(point: tuple[int, int], corners: Sequence[tuple[int, int]]) -> str:
    """Return where a point lies, in whole numbers: on an edge, or within by the number of edges to one side of it."""
    crossings = 0
    for (r0, c0), (r1, c1) in zip(corners, [*corners[1:], corners[0]], strict=True):
        turn = (r1 - r0) * (point[1] - c0) - (c1 - c0) * (point[0] - r0)
        if turn == 0 and min(r0, r1) <= point[0] <= max(r0, r1) and min(c0, c1) <= point[1] <= max(c0, c1):
            return "outline"
        crossings += (r0 > point[0]) != (r1 > point[0]) and (turn > 0) == (r1 > r0)
    return "inside" if crossings % 2 else "outside"


@given(POLYGON, st.sampled_from([1, 2]), st.integers(0, 8), st.booleans(), st.integers(0, 8))
def test_filling_does_not_depend_on_start_direction_or_repeated_points(
    corners: list[tuple[int, int]], whole: int, start: int, back: bool, twice: int
):
    corners = [(row // whole * whole, column // whole * whole) for row, column in corners]
    where = [[lies((2 * row, 2 * column), corners) for column in range(SHAPE[1])] for row in range(SHAPE[0])]
    again = [*corners[start % len(corners) :], *corners[: start % len(corners)]][:: -1 if back else 1]
    again.insert(twice % len(again), again[twice % len(again)])
    found = filled([(row / 2, column / 2) for row, column in again])
    assert np.array_equal(found.inside, np.asarray(where) == "inside")
    assert np.array_equal(found.on_outline, np.asarray(where) == "outline")


def test_a_centre_within_a_thousandth_of_a_pixel_of_the_outline_lies_on_it():
    assert np.count_nonzero(filled([(2.0009, 2.0009), (2.0009, 5.9991), (5.9991, 5.9991), (5.9991, 2.0009)]).all) == 25
    assert np.count_nonzero(filled([(2.002, 2.002), (2.002, 5.998), (5.998, 5.998), (5.998, 2.002)]).all) == 9


def box(top: float, left: float, bottom: float, right: float) -> list[tuple[float, float]]:
    return [(top, left), (top, right), (bottom, right), (bottom, left)]


@pytest.mark.parametrize("xor", [False, True])
@pytest.mark.parametrize("order", [1, -1])
def test_an_outline_through_centres_belongs_to_its_region_around_holes_and_islands(order: int, xor: bool):
    want = np.zeros(SHAPE, bool)
    want[0:9, 0:9] = True
    want[2:7, 2:7] = False
    want[4, 4] = True
    traced = [box(0, 0, 8, 8), [(1, 2), (1, 6), (2, 7), (6, 7), (7, 6), (7, 2), (6, 1), (2, 1)], [(4, 4)]]
    assert np.array_equal(joined([(filled(corners), xor) for corners in traced[::order]]), want)


def test_areas_that_share_the_centres_on_an_edge_are_one_area():
    found = joined([(filled(box(1, 1, 4, 7)), False), (filled(box(4, 2, 7, 5)), False), (filled(box(2, 7, 3, 8)), False)])
    want = np.zeros(SHAPE, bool)
    want[1:5, 1:8], want[4:8, 2:6], want[2:4, 7:9] = True, True, True
    assert np.array_equal(found, want)


@pytest.mark.parametrize("back", [False, True])
def test_a_mask_traced_through_the_centres_of_its_outermost_pixels_comes_back_as_it_was(back: bool, tmp_path: Path):
    sources = volume(VOLUME)
    corners = [box(3, 4, 8, 9), [(5, 5), (5, 8)], [(6, 7)]]
    order = -1 if back else 1
    lines = [contour(outline(one, points)[::order], one) for one, points in zip(sources, corners, strict=False)]
    put(tmp_path, [*sources, drawn(sources, *lines)])
    want = [EMPTY.copy() for _ in sources]
    want[0][3:9, 4:10], want[1][5, 5:9], want[2][6, 7] = 1, 1, 1
    assert same(used(tmp_path)[1], want)


@pytest.mark.parametrize("axes", [(1, 0, 0, 0, 1, 0), (0.8, 0.6, 0, -0.6, 0.8, 0)])
@pytest.mark.parametrize("decimals", [2, 3, 4])
def test_a_traced_mask_comes_back_as_it_was_though_its_points_are_rounded(decimals: int, axes: tuple[float, ...], tmp_path: Path):
    sources = volume(VOLUME, axes=axes, origin=(-20.12345, -30.98765, 40.4444), spacing=(0.70312, 0.70312))
    corners = box(3, 4, 12, 15)
    lines = [contour(np.round(outline(one, corners), decimals), one) for one in sources[:1]]
    lines += [
        contour(np.round(outline(one, [(5, 6), (7, 6), (7, 9), (9, 9), (9, 6), (11, 6)]), decimals), one) for one in sources[1:2]
    ]
    put(tmp_path, [*sources, drawn(sources, *lines)])
    want = [EMPTY.copy() for _ in sources]
    want[0][3:13, 4:16] = 1
    want[1][5:12, 6], want[1][7:10, 6:10] = 1, 1
    assert same(used(tmp_path)[1], want)


def outline(source: Dataset, corners: Sequence[tuple[float, float]]) -> np.ndarray:
    return np.concatenate([square(source, row, column, row, column)[:1] for row, column in corners])


FAR = (12.4, 17.4, 15.6, 20.6)


@pytest.mark.parametrize("kind", ["POINT", "OPEN_PLANAR", "OPEN_NONPLANAR", ""])
def test_an_image_on_which_a_region_has_points_or_open_lines_alone_is_refused_and_no_other(kind: str, tmp_path: Path):
    sources = volume(VOLUME)
    lines = [contour(square(sources[1], *BOX), sources[1]), contour(square(sources[3], 5, 5, 9, 9), sources[3], kind)]
    lines += [contour(square(sources[1], *FAR), sources[1], kind)]  # beside a closed one it may be a note
    put(tmp_path, [*sources, drawn(sources, *lines)])
    _, classes, data = used(tmp_path)
    assert same(classes, [EMPTY, FILLED, EMPTY, EMPTY])
    assert numbers(data) == [121]


def test_a_closed_contour_within_a_pixel_marks_the_pixel_that_it_lies_on(tmp_path: Path):
    sources = volume(VOLUME)
    tiny = [square(sources[1], *corners) for corners in [(5.1, 6.1, 5.8, 6.4), (14.2, 18.3, 14.7, 19.2), (7.6, 7.6, 8.4, 7.9)]]
    lines = [contour(square(sources[1], *BOX), sources[1]), *(contour(points, sources[1]) for points in tiny)]
    put(tmp_path, [*sources, drawn(sources, *lines, contour(square(sources[3], 5.1, 5.3, 5.4, 5.9), sources[3]))])
    beside, alone = FILLED.copy(), EMPTY.copy()
    beside[14, 19], alone[5, 6] = 1, 1  # within the region it leaves no hole
    assert same(used(tmp_path)[1], [EMPTY, beside, EMPTY, alone, EMPTY])


TWO_POINTS = [(4.3, 5.2), (9.1, 8.7)]


@pytest.mark.parametrize(
    "corners", [box(5.1, 5.4, 5.3, 12), box(5.1, 5, 5.9, 12), TWO_POINTS, TWO_POINTS[:1], [(5, 5.5), (8, 5.5), (5, 5.5)]]
)
def test_a_closed_contour_that_encloses_no_centre_makes_nothing_background(corners: list[tuple[float, float]], tmp_path: Path):
    sources = volume(VOLUME)
    lines = [contour(square(sources[1], *BOX), sources[1]), contour(outline(sources[3], corners), sources[3])]
    lines += [contour(outline(sources[1], corners), sources[1])]  # within the region it says nothing new
    put(tmp_path, [*sources, drawn(sources, *lines)])
    _, classes, data = used(tmp_path)
    assert same(classes, [EMPTY, FILLED, EMPTY, EMPTY])
    assert numbers(data) == [121]


def test_a_thin_contour_apart_from_the_rest_of_its_region_is_not_left_out(tmp_path: Path):
    sources = volume(VOLUME)
    lines = [contour(square(sources[1], *BOX), sources[1]), contour(square(sources[1], 16.1, 4, 16.8, 9), sources[1])]
    put(tmp_path, [*sources, drawn(sources, *lines)])
    _, classes, data = used(tmp_path)
    assert same(classes, [EMPTY] * 4)
    assert numbers(data) == [121]


@pytest.mark.parametrize("corners", [box(-1, 2, 4, 5), box(5.5, 4.5, 9.6, 9.6), box(-0.5, -0.5, 8.5, 8.5), box(-3, -3, 12, 12)])
def test_what_lies_off_the_image_is_cut_off_and_refused_where_it_is_most(corners: list[tuple[float, float]]):
    rows, columns = np.mgrid[0:9, 0:9]
    (top, left), _, (bottom, right), _ = corners
    want = (rows >= top) & (rows <= bottom) & (columns >= left) & (columns <= right)
    if top == -3:
        with pytest.raises(Refusal, match="most of the mask"):
            filled(corners)
    else:
        assert np.array_equal(filled(corners).all, want)


@pytest.mark.parametrize("corners", [box(20, 20, 22, 22), box(-9, -9, -7, -7), box(2, 2, 2, 9000), box(0, 0, 9e4, 9e4)])
def test_what_lies_far_off_or_is_far_too_large_is_refused(corners: list[tuple[float, float]]):
    with pytest.raises(Refusal):
        filled(corners * 500)


@pytest.mark.parametrize("corners", [box(0, 0, 9e3, 9e3), box(0, 0, 9e6, 5)], ids=["area", "outline"])
def test_no_room_is_made_for_what_is_far_too_large(corners: list[tuple[float, float]]):
    with pytest.raises(Refusal, match="far larger than its image"):
        filled(corners)


@pytest.mark.parametrize("order", [1, -1])
def test_each_image_that_a_contour_names_is_marked_wherever_it_stands_in_the_list(order: int, tmp_path: Path):
    sources, absent = volume(VOLUME), volume(VOLUME[:1])[0]
    made = contour(square(sources[2], *BOX), absent)
    made.ContourImageSequence.append(contour(square(sources[2], *BOX), sources[2]).ContourImageSequence[0])
    made.ContourImageSequence = list(made.ContourImageSequence)[::order]
    put(tmp_path, [*sources, drawn(sources, made)])
    assert same(used(tmp_path)[1], [EMPTY, EMPTY, FILLED, EMPTY, EMPTY])


def test_a_contour_that_names_the_whole_series_marks_the_image_in_its_plane(tmp_path: Path):
    sources = volume(VOLUME)
    made = contour(square(sources[2], *BOX))
    made.ContourImageSequence = [contour(square(one, *BOX), one).ContourImageSequence[0] for one in sources]
    put(tmp_path, [*sources, drawn(sources, made)])
    assert same(used(tmp_path)[1], [EMPTY, EMPTY, FILLED, EMPTY, EMPTY])


@pytest.mark.parametrize("harm", ["absent", "empty"])
def test_a_contour_without_any_point_costs_nothing_beside_others_of_its_region(harm: str, tmp_path: Path):
    sources = volume(VOLUME)
    bare = contour(square(sources[2], *BOX), sources[2])
    bare.NumberOfContourPoints, bare.ContourData = 0, None
    if harm == "absent":
        del bare.ContourData, bare.NumberOfContourPoints
    put(tmp_path, [*sources, drawn(sources, contour(square(sources[1], *BOX), sources[1]), bare)])
    assert same(used(tmp_path)[1], [EMPTY, FILLED, EMPTY, EMPTY, EMPTY])


@pytest.mark.parametrize("harm", ["alone", "should have some", "two numbers", "no numbers"])
def test_a_contour_whose_points_are_lost_costs_its_file(harm: str, tmp_path: Path):
    sources = volume(VOLUME)
    bare = contour(square(sources[2], *BOX), sources[2])
    bare.ContourData = [1.0, 2.0] if harm == "two numbers" else None
    if harm == "no numbers":
        del bare.ContourData
        bare.add_new("ContourData", "LO", ["a", "b", "c"])
    if harm == "alone":
        bare.NumberOfContourPoints = 0
    lines = [contour(square(sources[1], *BOX), sources[1])] * (harm != "alone")
    put(tmp_path, [*sources, drawn(sources, *lines, bare)])
    assert numbers(used(tmp_path)[2]) == [108, 117, 124]


def test_a_contour_a_hundred_times_as_large_as_its_image_is_refused_at_once():
    """As of centimetres that were taken for millimetres, or of a body that was drawn on a magnified copy."""
    turn = np.linspace(0.0, 2.0 * np.pi, 2000, endpoint=False)
    started = time.monotonic()
    with pytest.raises(Refusal, match="off the image"):
        fill(np.column_stack([2000.0 * np.cos(turn), 3000.0 * np.sin(turn)]), (20, 24))
    assert time.monotonic() - started < 10.0


@given(st.lists(st.tuples(st.integers(-3000, 12000), st.integers(-3000, 12000)), min_size=3, max_size=30))
def test_corners_that_lie_on_a_row_but_for_rounding_leave_no_line_behind(thousandths: list[tuple[int, int]]):
    points_N2 = np.asarray(thousandths) / 1000.0
    marked = Path2D(points_N2).contains_points(np.argwhere(np.ones(SHAPE))).reshape(SHAPE)
    try:
        found = fill(points_N2, SHAPE)
    except Refusal:
        return
    assert np.array_equal(found.inside, marked & ~found.on_outline)


@pytest.mark.parametrize("named", [True, False])
def test_a_region_of_another_frame_of_reference_than_the_first_lies_on_no_image_of_that(named: bool, tmp_path: Path):
    """An object lists the frames of reference of all its regions, and each region says which is its own (PS3.3 C.8.8.5)."""
    sources = volume(VOLUME)
    space = sources[0].FrameOfReferenceUID
    made = structures([contour(square(sources[1], *BOX))], space=space)
    other = item(FrameOfReferenceUID="1.2.3")
    made.ReferencedFrameOfReferenceSequence = [*made.ReferencedFrameOfReferenceSequence, other]
    if named:
        made.StructureSetROISequence[0].ReferencedFrameOfReferenceUID = other.FrameOfReferenceUID
    put(tmp_path, [*sources, made])
    _, masks, data = used(tmp_path)
    assert numbers(data) == ([108, 123, 124] if named else [124])
    assert same(masks, [] if named else [FILLED])


@pytest.mark.parametrize("others", [0, 1])
def test_a_region_that_nobody_drew_makes_no_image_background(others: int, tmp_path: Path):
    """Templates list every region that may be drawn; an object in which one is drawn was worked on."""
    sources = volume(VOLUME)
    made = drawn(sources, *[contour(square(sources[1], *BOX), sources[1])] * others)
    made.StructureSetROISequence = [*made.StructureSetROISequence, item(ROINumber=2, ROIName="lesion")]
    put(tmp_path, [*sources, made])
    _, masks, data = used(tmp_path)
    assert same(masks, [EMPTY, FILLED, *[EMPTY] * (len(sources) - 2)] if others else [])
    assert numbers(data) == ([] if others else [108, 117, 124])


@pytest.mark.parametrize("named", [True, False])
def test_contours_that_name_no_image_lie_on_none_of_two_phases_in_one_place(named: bool, tmp_path: Path):
    sources = volume(VOLUME)
    again = registered(sources)
    made = structures([contour(square(sources[1], *BOX), sources[1] if named else None)], listed=[*sources, *again])
    put(tmp_path, [*sources, *again, made])
    _, masks, data = used(tmp_path)
    assert [mask.any() for mask in masks].count(True) == int(named)
    assert (122 in numbers(data)) is not named


@pytest.mark.parametrize("first", ["lesion", "body"])
def test_two_regions_of_one_number_cost_their_file(first: str, tmp_path: Path):
    sources = volume(VOLUME)
    made = drawn(sources, contour(square(sources[1], *BOX), sources[1]))
    names = [first, "body" if first == "lesion" else "lesion"]
    made.StructureSetROISequence = [item(ROINumber=1, ROIName=name) for name in names]
    put(tmp_path, [*sources, made])
    _, masks, data = used(tmp_path)
    assert (masks, numbers(data)) == ([], [108, 117, 124])


@pytest.mark.parametrize("offset", [[0, 0, 0], [0, 0, 2.5]])
def test_a_contour_that_lies_beside_what_it_marks_is_not_drawn_in_its_plane(offset: list[float], tmp_path: Path):
    sources = volume(VOLUME)
    drawn_on = contour(square(sources[1], *BOX), sources[1])
    drawn_on.ContourOffsetVector = offset
    put(tmp_path, [*sources, drawn(sources, drawn_on)])
    _, masks, data = used(tmp_path)
    assert len(masks) == (0 if any(offset) else len(sources))
    assert numbers(data) == ([108, 121, 124] if any(offset) else [])


@pytest.mark.parametrize("region", [2, 0, None, 3])
def test_contours_of_a_region_that_is_not_described_cost_their_file(region: int | None, tmp_path: Path):
    sources = volume(VOLUME)
    made = drawn(sources, contour(square(sources[1], *BOX), sources[1]))
    made.StructureSetROISequence.append(item(ROINumber=3, ROIName=""))
    more = item(ContourSequence=[contour(square(sources[3], *BOX), sources[3])])
    if region is not None:
        more.ReferencedROINumber = region
    made.ROIContourSequence.append(more)
    put(tmp_path, [*sources, made])
    _, masks, data = used(tmp_path)
    assert (masks, numbers(data)) == ([], [108, 117, 124])


def test_contours_that_name_no_image_are_not_of_a_view_that_was_computed_from_its_series(tmp_path: Path):
    """A coronal view of the same frame of reference has a plane through the first point of every axial contour."""
    voxels = np.random.default_rng(3).integers(0, 3000, (24, 20, 24)).astype(np.uint16)
    source = volume(
        voxels, origin=(0, 0, 0), step=(0, 0, 1), spacing=(1, 1), FrameOfReferenceUID="1.2.3", StudyInstanceUID="1.2.4"
    )
    coronal = np.ascontiguousarray(voxels.transpose(1, 0, 2)[:, ::-1])
    placed = {"axes": (1, 0, 0, 0, 0, -1), "origin": (0, 0, 23), "step": (0, 1, 0), "spacing": (1, 1)}
    view = volume(coronal, **placed, FrameOfReferenceUID="1.2.3", StudyInstanceUID="1.2.4")
    drawn = [contour(square(one, *BOX)) for one in source[8:11]]
    put(tmp_path, [*source, structures(drawn, space="1.2.3")], "ct/{}")
    put(tmp_path, view, "mpr/{}")
    assert same(used(tmp_path)[1], [FILLED] * 3)

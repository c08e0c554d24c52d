"""How far slices lie apart, and which stacks lack some: at the limits of what passes for even."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from icmoe.data.ingest.geometry import missing_slices, slice_distance_mm
from icmoe.data.ingest.records import Plane

ACROSS: tuple[float, ...] = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def stack(heights_mm: Sequence[float], directions: tuple[float, ...] = ACROSS) -> list[Plane]:
    return [(10.0, 20.0, height_mm, *directions, 0.7, 0.7) for height_mm in heights_mm]  # type: ignore[misc]


@pytest.mark.parametrize(
    ("heights_mm", "distance_mm"),
    [
        ([0.0, 3.0], 3.0),
        ([6.0, 0.0, 3.0], 3.0),
        ([0.0, 3.0, 6.02], 3.01),
        ([0.0, 3.0, 6.04], None),
        ([0.0, 3.0, 9.0], None),
        ([0.0, 0.0], None),
        ([0.0], None),
    ],
)
def test_slices_have_a_distance_where_their_steps_differ_by_a_hundredth_at_most(
    heights_mm: list[float], distance_mm: float | None
) -> None:
    assert slice_distance_mm(stack(heights_mm)) == (None if distance_mm is None else pytest.approx(distance_mm))


def test_slices_that_are_tilted_or_unknown_have_no_distance() -> None:
    tilted = stack([3.0], (1.0, 0.0, 0.0, 0.0, 0.999, 0.0447))  # by 2.6 degrees
    assert slice_distance_mm([*stack([0.0]), *tilted]) is None
    assert slice_distance_mm([*stack([0.0, 3.0]), None]) is None


@pytest.mark.parametrize(
    ("heights_mm", "missing"),
    [
        ([0.0, 3.0, 6.0, 9.0], 0),
        ([0.0, 3.0, 6.0, 12.0], 1),
        ([0.0, 3.0, 12.0, 15.0, 18.0], 2),
        ([0.0, 3.0, 9.0], 0),  # of two steps nobody knows which is the series'
        ([0.0, 3.0, 6.0, 9.0, 15.0, 21.0], 0),  # wide steps side by side are how it was planned
        ([0.0, 3.0, 6.0, 9.0, 14.0], 0),  # no whole steps
        ([0.0, 3.0, 6.0, 9.0, 15.3], 0),
    ],
)
def test_a_stack_lacks_what_single_wide_steps_of_whole_slices_leave_out(heights_mm: list[float], missing: int) -> None:
    assert missing_slices(stack(heights_mm)) == missing

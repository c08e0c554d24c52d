"""Which listed images count as background: not those between marks that were drawn on every other slice."""

from __future__ import annotations

import pytest

from icmoe.data.ingest.background import not_background
from icmoe.data.ingest.records import FileRecord, Patch, Plane


def at(height_mm: float) -> Plane:
    return (0.0, 0.0, height_mm, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0)


@pytest.mark.parametrize("far_mm", [(), (40.0,), (40.0, 80.0)])
def test_slices_that_were_lost_do_not_hide_that_every_other_one_was_drawn_on(far_mm: tuple[float, ...]) -> None:
    """The step from slice to slice is the median one: a gap in the export makes it no larger."""
    drawn = (5.0, 15.0, 25.0)
    unmarked = {(f"at {height:g}", 0): at(height) for height in (0.0, 10.0, 20.0, 30.0, *far_mm)}
    record = FileRecord(kind="rtstruct", patches=tuple(Patch(number=n, label=1, plane=at(z)) for n, z in enumerate(drawn)))
    assert not_background(record, unmarked) == {("at 10", 0), ("at 20", 0)}

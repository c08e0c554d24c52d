"""The table of memory on real processes says what the samples say, of those that live through the study."""

from __future__ import annotations

from typing import Any

import pytest

from tests.chaos.memory import WARM_UP, shown

MB = 1_000_000


def column(table: Any, index: int) -> list[str]:
    return list(table.columns[index].cells)


def test_growth_is_that_after_the_warm_up_and_a_process_that_came_or_went_has_no_row():
    samples = [{("SuperNode", "A", 1): 50 * MB + 9 * MB * number} for number in range(WARM_UP)]
    samples += [
        {("SuperNode", "A", 1): 100 * MB + 7_000 * number, **({("ServerApp", "run", number): MB} if number else {})}
        for number in range(22)
    ]
    table = shown(samples)
    assert column(table, 0) == ["SuperNode"]
    assert column(table, 2) == ["100.0"]
    assert float(column(table, 4)[0]) == pytest.approx(7.0, abs=0.05)

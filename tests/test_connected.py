"""Connected strokes are scipy's to the bit, numbers included, whatever is drawn."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from icmoe.data.ingest.connected import runs_of, strokes_of

Drawn = npt.NDArray[np.bool_]


def numbers_of(drawn: Drawn) -> tuple[npt.NDArray[np.int64], int]:
    """Return the number of its stroke for every pixel, from 1, and how many there are."""
    runs = runs_of(drawn)
    marks, firsts = strokes_of(runs)
    numbers = np.zeros(drawn.shape, dtype=np.int64)
    numbers[drawn] = np.repeat(marks + 1, runs.lengths_R)
    assert [numbers[row, at % runs.stride] for row, at in zip(runs.rows_R, runs.starts_R, strict=True)] == list(marks + 1)
    assert list(marks[firsts]) == list(range(len(firsts)))
    return numbers, len(firsts)


def spiral(side: int) -> Drawn:
    """Return one stroke that winds from the corner to the middle, so that its rows find each other late."""
    drawn, at, step, length = np.zeros((side, side), dtype=bool), (0, 0), (0, 1), side - 1
    drawn[0, 0] = True
    for turn in range(side):
        for _ in range(length):
            at = (at[0] + step[0], at[1] + step[1])
            drawn[at] = True
        step = (step[1], -step[0])
        length -= 2 if turn and turn % 2 == 0 else 0
        if length <= 0:
            break
    return drawn


def same_as_scipy(drawn: Drawn) -> bool:
    numbers, count = numbers_of(drawn)
    expected, expected_count = ndimage.label(drawn, np.ones((3, 3)))
    return count == expected_count and np.array_equal(numbers, expected)


@given(rows=st.integers(1, 24), columns=st.integers(1, 24), share=st.floats(0.0, 1.0), seed=st.integers(0, 2**32 - 1))
def test_drawings_of_any_size_and_density(rows: int, columns: int, share: float, seed: int):
    assert same_as_scipy(np.random.default_rng(seed).random((rows, columns)) < share)


@pytest.mark.parametrize("side", [9, 33, 65])
def test_a_spiral_is_one_stroke_and_so_is_what_it_leaves(side: int):
    drawn = spiral(side)
    assert numbers_of(drawn)[1] == 1
    assert same_as_scipy(drawn)
    assert same_as_scipy(~drawn)


def test_the_end_of_a_row_does_not_touch_the_begin_of_the_next():
    drawn = np.zeros((3, 7), dtype=bool)
    drawn[0, -1] = drawn[1, 0] = drawn[2, -1] = True
    assert numbers_of(drawn)[1] == 3

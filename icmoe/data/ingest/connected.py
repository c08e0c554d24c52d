"""Connected strokes of a drawing by the runs of its rows: as `scipy.ndimage.label`, whose import takes longer than an export."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Runs:
    """Pixels beside each other on a row, in the order of rows and columns.

    Parameters
    ----------
    starts_R, ends_R
        Places of the first pixel and behind the last one, in rows that are `stride` long: one more than the picture is wide.
    stride
        Length of a row.
    """

    starts_R: Numbers
    ends_R: Numbers
    stride: int

    @property
    def rows_R(self) -> Numbers:
        """Row of each run."""
        return self.starts_R // self.stride

    @property
    def lengths_R(self) -> Numbers:
        """Pixels of each run."""
        return self.ends_R - self.starts_R


def runs_of(drawn_HW: npt.NDArray[np.bool_]) -> Runs:
    """Return the runs of what is drawn."""
    stride = drawn_HW.shape[1] + 1
    flat = np.zeros(drawn_HW.shape[0] * stride + 1, dtype=np.bool_)
    flat[1:].reshape(-1, stride)[:, :-1] = drawn_HW
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    return Runs(edges[::2], edges[1::2], stride)


def strokes_of(runs: Runs) -> tuple[Numbers, Numbers]:
    """Return the number of the stroke that each run is part of, and the first run of each stroke, which they are ordered by.

    Runs of neighbouring rows that touch, at a corner too, are of one stroke.
    """
    upper, lower = _touching(runs)
    order = np.arange(len(runs.starts_R))
    firsts = order.copy()
    while len(upper):
        one, other = firsts[upper], firsts[lower]
        apart = one != other
        upper, lower, one, other = upper[apart], lower[apart], one[apart], other[apart]
        np.minimum.at(firsts, np.maximum(one, other), np.minimum(one, other))
        while not np.array_equal(firsts, jumped := firsts[firsts]):
            firsts = jumped
    first = firsts == order
    return (np.cumsum(first) - 1)[firsts], np.flatnonzero(first)


def _touching(runs: Runs) -> tuple[Numbers, Numbers]:
    """Return all pairs of runs that touch, the upper and the lower one: those above a run are neighbours in the order."""
    begin = np.searchsorted(runs.ends_R + runs.stride, runs.starts_R, side="left")
    counts = np.searchsorted(runs.starts_R + runs.stride, runs.ends_R, side="right") - begin
    lower = np.repeat(np.arange(len(counts)), counts)
    return np.arange(len(lower)) + np.repeat(begin - np.cumsum(counts) + counts, counts), lower

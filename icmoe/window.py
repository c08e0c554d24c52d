"""Grey values on the scale of their series: the window of a series and what it makes of an image. NumPy alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

PERCENTILES = (0.5, 99.5)
WHOLE = 2**16
"""Whole numbers below this, either sign, are counted in a table."""


@dataclass(frozen=True, slots=True)
class Window:
    """Grey values that become 0 and 1.

    Parameters
    ----------
    low
        Grey value mapped to 0; finite.
    high
        Grey value mapped to 1; finite and above `low`.

    Raises
    ------
    ValueError
        Where `high` is not above `low` or one of them is not finite.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"a window needs finite low < high, not {self.low} and {self.high}")


class ValueCounts:
    """How often each grey value occurs in a series, collected image by image: exact, however long the series is.

    Beyond `MAX_VALUES` distinct values (only rescaled floats reach that) every second one joins its lower neighbour.
    """

    MAX_VALUES = 2**23

    def __init__(self) -> None:
        self._whole = np.zeros(2 * WHOLE, dtype=np.int64)
        self._values = np.empty(0, dtype=np.float64)
        self._counts = np.empty(0, dtype=np.int64)

    def add_counts(self, values_V: npt.NDArray[Any], counts_V: npt.NDArray[np.int64]) -> None:
        """Count distinct values, each as often as it occurs; those that are not finite are left out."""
        if values_V.dtype.kind in "iu" and values_V.size and int(values_V.min()) >= -WHOLE and int(values_V.max()) < WHOLE:
            self._whole[values_V.astype(np.int64) + WHOLE] += counts_V
            return
        known = np.isfinite(values_V)
        self._merge(values_V[known].astype(np.float64), counts_V[known])

    def _merge(self, values_V: npt.NDArray[np.float64], counts_V: npt.NDArray[np.int64]) -> None:
        self._values, where = np.unique(np.concatenate([self._values, values_V]), return_inverse=True)
        both = np.concatenate([self._counts, counts_V])
        self._counts = np.bincount(where.ravel(), weights=both, minlength=len(self._values)).astype(np.int64)
        while len(self._values) > self.MAX_VALUES:
            self._counts = np.add.reduceat(self._counts, np.arange(0, len(self._counts), 2))
            self._values = self._values[::2]

    def window(self) -> Window:
        """Return percentiles 0.5 and 99.5 of all pixels (linear interpolation).

        Where the percentiles coincide (a small object on an empty ground) the extremes are taken, and [v, v + 1] where
        every pixel is v; so far from 0 that v + 1 is v, the next number.

        Raises
        ------
        ValueError
            Where there is no finite pixel.
        """
        present = np.flatnonzero(self._whole)
        self._merge((present - WHOLE).astype(np.float64), self._whole[present])
        self._whole[:] = 0
        if self._values.size == 0:
            raise ValueError("a window needs at least one finite pixel")
        ends = np.cumsum(self._counts)
        low, high = (self._percentile(ends, share) for share in PERCENTILES)
        if low >= high:
            low, high = float(self._values[0]), float(self._values[-1])
        return Window(low, high if high > low else max(low + 1.0, math.nextafter(low, math.inf)))

    def _percentile(self, ends: npt.NDArray[np.int64], share: float) -> float:
        at = (float(ends[-1]) - 1.0) * (share / 100.0)
        rank = math.floor(at)
        below, above = (float(self._values[np.searchsorted(ends, place, side="right")]) for place in (rank, math.ceil(at)))
        part = at - rank
        if not math.isfinite(above - below):  # a gap wider than a float64 holds
            return below * (1.0 - part) + above * part
        return below + (above - below) * part if part < 0.5 else above - (above - below) * (1.0 - part)


def normalise(image_HW: npt.NDArray[Any], window: Window) -> npt.NDArray[np.float32]:
    """Return grey values on the scale of their series, the same whatever linear scale a file stored them in.

    Parameters
    ----------
    image_HW
        Grey image, any real dtype; pixels that are not finite count as `window.low`.
    window
        Grey values mapped to 0 and 1; what lies outside is clipped.

    Returns
    -------
    ndarray
        H x W float32 in [0, 1].
    """
    image_HW = np.asarray(image_HW)
    if image_HW.dtype.kind in "iu" and image_HW.size:
        lowest, highest = int(image_HW.min()), int(image_HW.max())
        if highest - lowest < min(2**16, image_HW.size):  # fewer values than pixels: each is computed once
            table = _scaled(np.arange(lowest, highest + 1), window)
            return np.asarray(table[np.subtract(image_HW, lowest, dtype=np.int64)])
        return _scaled(image_HW, window)
    return _scaled(np.nan_to_num(image_HW.astype(np.float64), nan=window.low, posinf=window.low, neginf=window.low), window)


def _scaled(values: npt.NDArray[Any], window: Window) -> npt.NDArray[np.float32]:
    values, low, high = values.astype(np.float64), window.low, window.high
    if not math.isfinite(high - low):  # beyond what a float64 holds; of halves it is not, and the shares are the same
        values, low, high = values / 2, low / 2, high / 2
    scaled = (values - low) / (high - low)
    return np.clip(scaled, 0.0, 1.0).astype(np.float32)

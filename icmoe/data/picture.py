"""A picture as the values that occur in it and, for each pixel, the rank of its value among them.

What is done to a picture value by value (a scale, a table, a window) is done to some thousand values instead of to every
pixel, and the ranks, which no rising scale changes, are hashed once.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from icmoe.window import Window, normalise

SPAN = 2**20
"""Widest range of whole numbers whose ranks are looked up in a table; others are sorted."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A grey picture; its pixels are `values_V[ranks_HW]`.

    Parameters
    ----------
    values_V
        The distinct values in rising order, what is no number last; any real dtype.
    counts_V
        How many pixels have each; at least 1.
    ranks_HW
        Places in `values_V`, in the smallest unsigned type that holds all of them.
    """

    values_V: npt.NDArray[Any]
    counts_V: npt.NDArray[np.int64]
    ranks_HW: npt.NDArray[np.unsignedinteger[Any]]

    @property
    def grey_HW(self) -> npt.NDArray[Any]:
        """The pixels."""
        return self.values_V.take(self.ranks_HW)

    @property
    def finite_V(self) -> npt.NDArray[np.bool_]:
        """Which values are finite."""
        return np.asarray(np.isfinite(self.values_V))

    @property
    def mean(self) -> float:
        """Mean of the finite pixels."""
        known = self.finite_V
        return float(np.average(self.values_V[known].astype(np.float64), weights=self.counts_V[known]))

    def of_values(self, values_V: npt.NDArray[Any]) -> Picture:
        """Return the picture that has these values in place of its own, in the same places and in any order."""
        if bool((values_V[1:] > values_V[:-1]).all()):
            return Picture(values_V, self.counts_V, self.ranks_HW)
        found, ranks = np.unique(values_V, return_inverse=True)
        counts = np.bincount(ranks, weights=self.counts_V).astype(np.int64)
        return Picture(found, counts, ranks.astype(_rank_type(len(found))).take(self.ranks_HW))


def picture_of(grey_HW: npt.NDArray[Any]) -> Picture:
    """Return a picture of any real dtype; whole numbers close together are not sorted."""
    if grey_HW.size and grey_HW.dtype.kind in "iu":
        lowest = int(grey_HW.min())
        if int(grey_HW.max()) - lowest < SPAN:
            unsigned = np.dtype(grey_HW.dtype.str.replace("i", "u"))  # where a difference is right, though its ends wrap round
            above_HW = np.subtract(grey_HW.view(unsigned), unsigned.type(lowest % 2 ** (8 * grey_HW.itemsize))).astype(np.intp)
            counts = np.bincount(above_HW.ravel())
            present = np.flatnonzero(counts)
            ranks = np.empty(len(counts), dtype=_rank_type(len(present)))
            ranks[present] = np.arange(len(present))
            return Picture((present + lowest).astype(grey_HW.dtype), counts[present], ranks.take(above_HW))
    values, inverse, counts = np.unique(grey_HW, return_inverse=True, return_counts=True)
    return Picture(values, counts, inverse.reshape(grey_HW.shape).astype(_rank_type(len(values))))


def ranks_digest(ranks_HW: npt.NDArray[np.unsignedinteger[Any]]) -> bytes:
    """Return the SHA-256 of a picture's ranks and shape."""
    little = np.ascontiguousarray(ranks_HW, dtype=ranks_HW.dtype.newbyteorder("<"))
    digest = hashlib.sha256(f"{little.itemsize}:{'x'.join(map(str, little.shape))}:".encode())
    digest.update(little.data)
    return digest.digest()


def marks_digest(classes_HW: npt.NDArray[np.uint8]) -> str:
    """Return the SHA-256 of the rows of class indices that have a mark and of which they are; empty where none has."""
    if not classes_HW.any():  # as of most frames
        return ""
    marked_H = np.flatnonzero(classes_HW.any(axis=1))
    return hashlib.sha256(marked_H.tobytes() + classes_HW[marked_H].tobytes()).hexdigest()


def picture_digest(ranks: bytes, values_V: npt.NDArray[Any], window: Window) -> str:
    """Return the digest of a picture on the scale of its series, from its `ranks_digest` and its values.

    It is equal for every file that stores the same picture, however compressed and on whatever rising linear scale.
    """
    scaled = normalise(values_V, window)
    return hashlib.sha256(ranks + scaled.astype("<f4").tobytes()).hexdigest()


def _rank_type(count: int) -> type[np.unsignedinteger[Any]]:
    return np.uint8 if count <= 2**8 else np.uint16 if count <= 2**16 else np.uint32

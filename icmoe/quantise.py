"""Int8 updates with error feedback: a byte per value and one per row, and what rounding leaves out is sent later.

    x_r = delta_r + e_(r-1)                     a site's update of round r and what it still owes
    k   = the least whole number with |x_r| < 127.5 * 2^k        for each row of a tensor
    q_r = x_r / 2^k rounded, ties to even       sent: q_r from -127 to 127, and k
    e_r = x_r - 2^k q_r                         stays at the site; |e_r| <= 2^k / 2

Summed over the rounds, what was sent is what was trained but for the last remainder: sum_r 2^k q_r = sum_r delta_r - e_R.
Error feedback is Seide et al.'s (1-bit stochastic gradient descent, Interspeech 2014); Karimireddy et al. (arXiv
1901.09847) show that with it compressed steps converge as uncompressed ones do, and may not without.

The scale of a row is a power of two, which costs half a bit on average. For that 2^k q and e are exact in float32, so that
site and coordinator, a hospital's process and a simulation, hold the same bits; a scale cannot be NaN, infinite, negative or
zero; and no value that is sent has more than seven significant bits.

Everything after the coordinator's door sees 2^k q as an update in float32: bounds, weights, sums, robust rules. What is owed
takes the weights of the round in which it is sent. Under [privacy.site] x is made of noised tensors alone, so q and e are
post-processing. Under [privacy.server] the norm of 2^k q may be above that of delta, and is clipped to C all the same, so
the sensitivity is that of float32; e makes a site's update depend on its own past rounds and on the models released before,
which composition over rounds allows, and on no other site.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

EXPONENT = ".exponent"
"""Ends the name under which the k of a tensor's rows travel beside its q."""
LARGEST = 127
LOWEST_EXPONENT, HIGHEST_EXPONENT = -126, 120
"""Between them 2^k is a normal float32, and 2^k q is finite."""
MANTISSA_BITS = 6
"""Bits after the leading one that a value in this form has at most."""

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.int8]
Shape = tuple[int, ...]


def rows_of(shape: Shape) -> int:
    """Return R, the rows of a tensor that have a scale each: its first dimension, all of a vector together."""
    return shape[0] if len(shape) > 1 else 1


def sent_shapes(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Return names and shapes of the int8 arrays that stand for float32 tensors of these names and shapes."""
    exponents = {name + EXPONENT: (rows_of(shape),) for name, shape in shapes.items()}
    return dict(sorted({**shapes, **exponents}.items()))


def quantised(tensor: Floats) -> tuple[Bytes, Bytes]:
    """Return q in the tensor's shape and k per row.

    Parameters
    ----------
    tensor
        Finite; beyond 127 * 2^120 it is cut off.
    """
    rows_RN = _rows(tensor)
    mantissa_R, exponent_R = np.frexp(np.abs(rows_RN).max(axis=1, initial=0.0))  # the largest is m 2^e, 1/2 <= m < 1
    exponent_R = exponent_R - 7 + (mantissa_R >= 127.5 / 128)
    exponent_R = np.where(mantissa_R > 0.0, exponent_R, LOWEST_EXPONENT).clip(LOWEST_EXPONENT, HIGHEST_EXPONENT)
    steps_RN = np.rint(rows_RN * _powers(-exponent_R)).clip(-LARGEST, LARGEST)
    return steps_RN.astype(np.int8).reshape(tensor.shape), exponent_R.astype(np.int8)


def dequantised(steps: Bytes, exponent_R: Bytes) -> Floats:
    """Return 2^k q in float32, exactly."""
    floats: Floats = (_rows(steps).astype(np.float32) * _powers(exponent_R)).reshape(steps.shape)
    return floats


def out_of_range(name: str, values: npt.NDArray[Any]) -> int:
    """Return how many values of an int8 array no update holds; `name` says whether it holds exponents."""
    low, high = (LOWEST_EXPONENT, HIGHEST_EXPONENT) if name.endswith(EXPONENT) else (-LARGEST, LARGEST)
    return int(np.count_nonzero((values < low) | (values > high)))


class Dequantised(Mapping[str, Floats]):
    """An update in int8 as float32 tensors, each made when it is asked for: no second copy of the update is held.

    Parameters
    ----------
    sent
        q and k by name, in range.
    """

    def __init__(self, sent: Mapping[str, Bytes]) -> None:
        self._sent = sent
        self._names = [name for name in sent if not name.endswith(EXPONENT)]

    def __getitem__(self, name: str) -> Floats:
        """Return a tensor."""
        return dequantised(self._sent[name], self._sent[name + EXPONENT])

    def __iter__(self) -> Iterator[str]:
        """Return the tensors' names."""
        return iter(self._names)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._names)


def _rows(tensor: npt.NDArray[Any]) -> npt.NDArray[Any]:
    rows = rows_of(tensor.shape)
    return tensor.reshape(rows, math.prod(tensor.shape[1:]) if tensor.ndim > 1 else tensor.size)


def _powers(exponent_R: npt.NDArray[Any]) -> Floats:
    """Return 2^k as a column."""
    powers: Floats = np.ldexp(np.float32(1.0), exponent_R.astype(np.int32))[:, None]
    return powers

"""Noise and draws of differential privacy, from the operating system's generator alone.

A run's seed is known to the coordinator, who would subtract the noise; a statistical generator (Philox, PCG) can be
told from its output. So every bit comes from `os.urandom`, through the inverse normal distribution: 40 000 values
cost some milliseconds. Four draws are summed and halved, so that the gaps between the floating-point values of a
single draw do not show through (Holohan and Braghin, arXiv 2107.10138, as in Opacus).
"""

from __future__ import annotations

import os
import secrets
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

_DRAWS = 4
_BITS = 52  # one less than a float64 holds, so that the largest value stays below 1

Vector = npt.NDArray[np.float64]


def uniform(count: int) -> Vector:
    """Return `count` independent values, uniform in the open interval (0, 1)."""
    whole = np.frombuffer(os.urandom(8 * count), dtype=np.uint64) >> np.uint64(64 - _BITS)
    return (whole.astype(np.float64) + 0.5) / 2.0**_BITS


def gaussian(count: int) -> Vector:
    """Return `count` independent standard normal values."""
    from scipy.special import ndtri  # a fifth of a second that a message without privacy can do without

    draws: Vector = ndtri(uniform(_DRAWS * count)).reshape(_DRAWS, count)
    summed: Vector = draws.sum(axis=0) / np.sqrt(_DRAWS)
    return summed


def torch_generator(device: torch.device) -> torch.Generator:
    """Return a generator with a fresh secret seed, for router noise and anchors: they are no part of the promise."""
    import torch  # only where something is trained; the coordinator's noise does without

    return torch.Generator(device).manual_seed(secrets.randbits(63))

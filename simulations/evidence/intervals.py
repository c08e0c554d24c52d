"""Means with 95% intervals, over seeds and over patients. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np

T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t, 97.5%, for 1 to 9 degrees of freedom."""
DRAWS = 10_000


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and its 95% interval.

    Parameters
    ----------
    mean
        Of the values.
    low, high
        Bounds; None where one value says nothing of the spread.
    """

    mean: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        """Return the interval for a table."""
        return f"{self.mean:+.3f}" + ("" if self.low is None else f" [{self.low:+.3f}, {self.high:+.3f}]")


def over_seeds(values: Sequence[float]) -> Interval:
    """Return the mean over one to ten seeds with its t-interval: how far another seed would move it.

    Raises
    ------
    ValueError
        Where there is no value, or more than ten.
    """
    if not 1 <= len(values) <= len(T_975) + 1:
        raise ValueError(f"{len(values)} seeds: 1 to {len(T_975) + 1} expected")
    mean = fmean(values)
    if len(values) == 1:
        return Interval(mean, None, None)
    half = T_975[len(values) - 2] * stdev(values) / len(values) ** 0.5
    return Interval(mean, mean - half, mean + half)


def over_patients(gains: Mapping[str, Sequence[float]], *, seed: int = 0) -> Interval:
    """Return the mean over sites of the mean gain of their patients, with a bootstrap of patients within sites.

    It says how far other patients of the same hospitals would move the mean; the hospitals themselves are fixed. With few
    patients it is too narrow: with four at each of three sites it holds the true mean in 88 % of cases instead of 95 %.

    Parameters
    ----------
    gains
        Per site the paired difference of each patient, at least one per site.
    seed
        Of the draws.

    Raises
    ------
    ValueError
        Where a site has no patient.
    """
    if not gains or not all(gains.values()):
        raise ValueError("at least one patient per site expected")
    rng = np.random.default_rng(seed)
    values_SP = [np.asarray(gains[site]) for site in sorted(gains)]
    means_SD = [values_P[rng.integers(len(values_P), size=(DRAWS, len(values_P)))].mean(axis=1) for values_P in values_SP]
    low, high = np.quantile(np.mean(means_SD, axis=0), [0.025, 0.975])
    return Interval(fmean(fmean(values) for values in gains.values()), float(low), float(high))

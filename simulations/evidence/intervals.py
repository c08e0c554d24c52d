"""Means with 95% intervals, over seeds and over patients. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev, variance

from scipy.stats import t


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
    """Return the mean over seeds, at least one, with its t-interval: how far another seed would move it.

    Raises
    ------
    ValueError
        Where there is no value.
    """
    if not values:
        raise ValueError("no seed: at least 1 expected")
    mean = fmean(values)
    if len(values) == 1:
        return Interval(mean, None, None)
    half = float(t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return Interval(mean, mean - half, mean + half)


def over_patients(gains: Mapping[str, Sequence[float]]) -> Interval:
    """Return the mean over sites of the mean gain of their patients, with the t-interval of a stratified sample.

    It says how far other patients of the same hospitals would move the mean; the hospitals themselves are fixed. Each site has
    a variance of its own; the degrees of freedom of their sum are Welch's and Satterthwaite's. A site with one patient says
    nothing of its variance, and the mean has no interval then.

    Parameters
    ----------
    gains
        Per site the paired difference of each patient, at least one per site.

    Raises
    ------
    ValueError
        Where a site has no patient.
    """
    if not gains or not all(gains.values()):
        raise ValueError("at least one patient per site expected")
    mean = fmean(fmean(values) for values in gains.values())
    if min(map(len, gains.values())) < 2:
        return Interval(mean, None, None)
    parts = [(variance(values) / len(values), len(values) - 1) for values in gains.values()]
    whole, spread = sum(part for part, _ in parts), sum(part**2 / free for part, free in parts)
    half = float(t.ppf(0.975, whole**2 / spread)) * whole**0.5 / len(gains) if spread > 0.0 else 0.0
    return Interval(mean, mean - half, mean + half)

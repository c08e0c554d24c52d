"""The Gaussian mechanism without subsampling: exact epsilon of a history."""

from __future__ import annotations

import math
from collections.abc import Callable

ACCOUNTANT = "Gaussian, exact"
_LARGEST_EPSILON = 1e6
_PRECISION = 1e-9


def delta_of(epsilon: float, releases: int, noise_multiplier: float) -> float:
    """Return the least delta with which `releases` Gaussian releases together are (epsilon, delta)-DP.

    Equal releases compose to one of mu = sqrt(releases) / z, whose privacy profile is known in closed form (Balle and
    Wang, arXiv 1805.06530, theorem 8): Phi(mu/2 - eps/mu) - e^eps Phi(-mu/2 - eps/mu).

    Parameters
    ----------
    epsilon
        At least 0.
    releases
        At least 1; each of them, all of its parts together, has noise z times its L2 sensitivity.
    noise_multiplier
        z > 0.
    """
    mu = math.sqrt(releases) / noise_multiplier
    # Where the second term underflows, delta comes out too large: an upper bound still.
    return _normal(mu / 2 - epsilon / mu) - math.exp(min(epsilon, 700.0)) * _normal(-mu / 2 - epsilon / mu)


def epsilon_of(releases: int, noise_multiplier: float, delta: float) -> float:
    """Return the epsilon of `releases` Gaussian releases at `delta`, rounded up in the last digits; 0 of none.

    Parameters
    ----------
    releases, noise_multiplier
        As for `delta_of`.
    delta
        In (0, 1).
    """
    if not releases or delta_of(0.0, releases, noise_multiplier) <= delta:
        return 0.0
    low, high = 0.0, 1.0
    while delta_of(high, releases, noise_multiplier) > delta:
        low, high = high, 2.0 * high
        if high > _LARGEST_EPSILON:
            return math.inf
    return least_kept(lambda epsilon: delta_of(epsilon, releases, noise_multiplier) <= delta, low, high, _PRECISION)


def noise_for(epsilon: float, delta: float, releases: int) -> float:
    """Return the least noise multiplier with which `releases` releases keep epsilon at delta, rounded up in the last digits."""
    low, high = 0.0, 1.0
    while epsilon_of(releases, high, delta) > epsilon:
        low, high = high, 2.0 * high
    return least_kept(lambda noise: epsilon_of(releases, noise, delta) <= epsilon, low, high, _PRECISION)


def least_kept(kept: Callable[[float], bool], low: float, high: float, precision: float) -> float:
    """Return the least value above `low` that is kept, to a share `precision` of it upwards; so are `high` and what is above."""
    while high - low > precision * high:
        middle = 0.5 * (low + high)
        low, high = (low, middle) if kept(middle) else (middle, high)
    return high


def _normal(value: float) -> float:
    """Return Phi(value)."""
    return 0.5 * math.erfc(-value / math.sqrt(2.0))

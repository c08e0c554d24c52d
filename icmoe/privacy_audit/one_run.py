"""Lower bound on epsilon from one run (Steinke, Nasr, Jagielski, arXiv 2305.08846). Pure functions.

m canaries take part or not by fair coins. An auditor sees what is released, guesses r of the coins and gets v right.

**delta = 0.** Given the release and all other coins, a coin is guessed with probability at most p = e^eps / (1 + e^eps),
since the odds of "in" start at 1 and the release changes them by at most a factor e^eps. Revealing the coins one after the
other, the number of right guesses is dominated by W ~ Binomial(r, p); so P[right >= v] <= P[W >= v].

**delta > 0.** With probability at most 2 delta per canary that bound does not hold, as if the coin were revealed. Let F be
the number of revealed coins: E[F] <= 2 m delta, and v right guesses need W >= v - F. For any law of F,
P[W + F >= v] = sum_i P[F = i] P[W >= v - i] <= P[W >= v] + sum_i P[F = i] P[v > W >= v - i]
<= P[W >= v] + E[F] max_i (1/i) P[v > W >= v - i], since P[v > W >= v - i] <= i max_j (1/j) P[v > W >= v - j].
That is the paper's theorem 5.2:

    p-value = P[W >= v] + 2 m delta max_{1 <= i <= v} (1/i) P[v > W >= v - i]
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.special import expit
from scipy.stats import binom, norm

from icmoe.gaussian import noise_for

CONFIDENCE = 0.95
_LARGEST_EPSILON = 100.0
_PRECISION = 1e-4
_CANDIDATES = 40
_CAUTION = 2.0  # standard deviations below the expected right guesses that a plan still counts on


def p_value(canaries: int, guesses: int, correct: int, *, epsilon: float, delta: float) -> float:
    """Return the largest probability of so many right guesses under an (epsilon, delta)-DP mechanism.

    Parameters
    ----------
    canaries
        m, those not guessed included.
    guesses
        r, in [0, m].
    correct
        v, in [0, r].
    epsilon
        At least 0, under addition or removal of one canary.
    delta
        In [0, 1).

    Raises
    ------
    ValueError
        Where the counts do not nest.
    """
    if not 0 <= correct <= guesses <= canaries:
        raise ValueError(f"0 <= correct <= guesses <= canaries, not {correct}, {guesses}, {canaries}")
    p = expit(epsilon)
    tail = float(binom.sf(correct - 1, guesses, p))
    if delta == 0.0 or correct == 0:
        return min(tail, 1.0)
    below_i = np.cumsum(binom.pmf(np.arange(correct - 1, -1, -1), guesses, p))
    steepest = float((below_i / np.arange(1, correct + 1)).max())
    return min(tail + 2.0 * canaries * delta * steepest, 1.0)


def epsilon_lower_bound(canaries: int, guesses: int, correct: int, *, delta: float, confidence: float = CONFIDENCE) -> float:
    """Return the epsilon below which the guesses are too good, with at least `confidence`; 0 where nothing is shown.

    The least epsilon that is not refuted, rounded down; the number of guesses must not depend on the coins.

    Parameters
    ----------
    canaries, guesses, correct, delta
        As for `p_value`.
    confidence
        In (0, 1).
    """
    low, high = 0.0, 1.0

    def refuted(epsilon: float) -> bool:
        return p_value(canaries, guesses, correct, epsilon=epsilon, delta=delta) <= 1.0 - confidence

    if not refuted(low):
        return 0.0
    while refuted(high) and high < _LARGEST_EPSILON:
        low, high = high, 2.0 * high
    while high - low > _PRECISION:
        middle = 0.5 * (low + high)
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def correct_guesses(scores_m: npt.NDArray[np.float64], taken_m: npt.NDArray[np.bool_], guesses: int) -> int:
    """Return how many guesses are right: half of them say "in" to the highest scores, half say "out" to the lowest.

    Parameters
    ----------
    scores_m
        Higher speaks for "in".
    taken_m
        The coins.
    guesses
        Even, at most m.
    """
    order_m, half = np.argsort(scores_m, kind="stable"), guesses // 2
    return int(taken_m[order_m[len(order_m) - half :]].sum() + (~taken_m[order_m[:half]]).sum())


def expected_accuracy(share: float, mu: float) -> float:
    """Return the expected share of right guesses about a Gaussian mechanism.

    Parameters
    ----------
    share
        Guesses over canaries, in (0, 1], highest and lowest scores in equal parts.
    mu
        Distance of the means of "in" and "out" in standard deviations of the noise.
    """

    def upper(threshold: float) -> float:
        return float(0.5 * norm.sf(threshold) + 0.5 * norm.sf(threshold - mu) - 0.5 * share)

    threshold = float(brentq(upper, -40.0, 40.0 + mu))
    return float(norm.sf(threshold - mu) / share)


@lru_cache(maxsize=64)
def planned_guesses(canaries: int, *, epsilon: float, delta: float) -> int:
    """Return the even number of guesses that shows most where only half of the needed noise is added.

    It follows from public numbers alone, so that choosing it costs no confidence. The mechanism is taken as one Gaussian
    release that just keeps (epsilon, delta); any other keeps the bound valid and is only shown less sharply.

    Parameters
    ----------
    canaries
        m, at least 2.
    epsilon
        Claimed, above 0.
    delta
        Claimed, in (0, 1).
    """
    mu = 2.0 / noise_for(epsilon, delta, 1)
    halves = np.unique(np.geomspace(1, max(canaries // 2, 1), _CANDIDATES).astype(int))

    def shown(half: int) -> float:
        guesses = 2 * half
        accuracy = expected_accuracy(guesses / canaries, mu)
        correct = guesses * accuracy - _CAUTION * (guesses * accuracy * (1.0 - accuracy)) ** 0.5
        return epsilon_lower_bound(canaries, guesses, max(0, int(correct)), delta=delta)

    return 2 * int(max(halves, key=shown))

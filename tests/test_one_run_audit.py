"""The bound from one run: golden values worked out by hand, order in every argument, validity on a mechanism known exactly."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icmoe.gaussian import noise_for
from icmoe.privacy_audit.one_run import correct_guesses, epsilon_lower_bound, expected_accuracy, p_value, planned_guesses


def test_all_right_without_delta_is_the_power_of_one_guess() -> None:
    """P[W >= r] = p^r, so the bound is the log-odds of 0.05^(1/r)."""
    p = 0.05 ** (1 / 100)
    assert p_value(100, 100, 100, epsilon=math.log(p / (1 - p)), delta=0.0) == pytest.approx(0.05)
    assert epsilon_lower_bound(100, 100, 100, delta=0.0) == pytest.approx(math.log(p / (1 - p)), abs=2e-4)
    assert epsilon_lower_bound(100, 100, 100, delta=0.0) == pytest.approx(3.4930, abs=2e-4)


def test_two_of_three_by_hand() -> None:
    """p = 3/4 at eps = log 3: P[W >= 2] = 3 (9/16)(1/4) + 27/64 = 54/64; below 2: P[W = 1] = 9/64, P[W = 0] = 1/64."""
    assert p_value(3, 3, 2, epsilon=math.log(3), delta=0.0) == pytest.approx(54 / 64)
    # max over i of P[2 > W >= 2 - i] / i: i = 1 gives 9/64, i = 2 gives 10/128.
    assert p_value(10, 3, 2, epsilon=math.log(3), delta=0.01) == pytest.approx(54 / 64 + 2 * 10 * 0.01 * 9 / 64)


def test_the_steepest_step_is_not_always_the_first() -> None:
    """Two guesses, p = 1/2: i = 1 gives P[W = 1] = 1/2, i = 2 gives 3/8. Eight: the mass lies deeper below v."""
    assert p_value(2, 2, 2, epsilon=0.0, delta=0.1) == pytest.approx(1 / 4 + 0.4 * 1 / 2)
    tails = [sum(math.comb(8, k) for k in range(8 - i, 8)) / 256 / i for i in range(1, 9)]
    assert tails.index(max(tails)) > 2
    assert p_value(8, 8, 8, epsilon=0.0, delta=0.01) == pytest.approx(1 / 256 + 2 * 8 * 0.01 * max(tails))


COUNTS = st.integers(1, 300).flatmap(
    lambda m: st.integers(1, m).flatmap(lambda r: st.tuples(st.just(m), st.just(r), st.integers(0, r)))
)
DELTAS = st.sampled_from([0.0, 1e-6, 1e-4, 1e-2])


@settings(max_examples=60, deadline=None)
@given(counts=COUNTS, delta=DELTAS, low=st.floats(0, 8), more=st.floats(0, 4))
def test_a_larger_epsilon_explains_more(counts, delta, low, more) -> None:
    m, r, v = counts
    weak = p_value(m, r, v, epsilon=low, delta=delta)
    assert weak <= p_value(m, r, v, epsilon=low + more, delta=delta) + 1e-9 or weak > 0.5  # above, neither is refuted


@settings(max_examples=40, deadline=None)
@given(counts=COUNTS, delta=DELTAS)
def test_more_right_guesses_show_more_and_delta_or_silent_canaries_less(counts, delta) -> None:
    m, r, v = counts
    bound = epsilon_lower_bound(m, r, v, delta=delta)
    assert bound <= epsilon_lower_bound(m, r, min(v + 1, r), delta=delta) + 2e-4
    assert bound >= epsilon_lower_bound(m, r, v, delta=delta + 1e-3) - 2e-4
    assert bound >= epsilon_lower_bound(2 * m, r, v, delta=delta) - 2e-4
    assert bound >= epsilon_lower_bound(m, r, v, delta=delta, confidence=0.99) - 2e-4


@given(half=st.integers(1, 500))
def test_chance_shows_nothing(half: int) -> None:
    assert epsilon_lower_bound(2 * half, 2 * half, half, delta=1e-5) == 0.0


@pytest.mark.parametrize(("m", "r", "v"), [(10, 11, 5), (10, 5, 6), (10, 5, -1)])
def test_counts_must_nest(m: int, r: int, v: int) -> None:
    with pytest.raises(ValueError, match="correct <= guesses <= canaries"):
        p_value(m, r, v, epsilon=1.0, delta=0.0)


def test_the_bound_holds_for_randomised_response() -> None:
    """The mechanism that the theorem is tight for: a bound above its epsilon comes up in about 5 % of runs, not more."""
    rng, epsilon = np.random.default_rng(0), 1.0
    right = rng.binomial(400, 1 / (1 + math.exp(-epsilon)), size=200)
    bounds = [epsilon_lower_bound(400, 400, int(v), delta=0.0) for v in right]
    assert 0.01 <= np.mean(np.array(bounds) > epsilon) <= 0.08
    assert np.median(bounds) > 0.75


def test_the_ends_are_guessed() -> None:
    scores = np.array([0.1, -3.0, 5.0, 0.2, 2.0, -1.0])
    taken = np.array([True, False, True, False, False, True])
    assert correct_guesses(scores, taken, 4) == 2  # in: 5 right, 2 wrong; out: -3 right, -1 wrong
    assert correct_guesses(scores, taken, 0) == 0


@pytest.mark.parametrize(("share", "mu"), [(1.0, 0.5), (0.02, 0.27), (0.02, 0.54)])
def test_the_expected_accuracy_is_that_of_draws(share: float, mu: float) -> None:
    rng = np.random.default_rng(0)
    taken = rng.random(400_000) < 0.5
    guesses = int(share * len(taken))
    found = correct_guesses(rng.standard_normal(len(taken)) + mu * taken, taken, guesses) / guesses
    assert expected_accuracy(share, mu) == pytest.approx(found, abs=0.015)


def test_the_plan_tells_half_the_noise_from_the_whole() -> None:
    """At epsilon 1 and delta 1e-5 with 40 000 canaries: where it stands in the checks."""
    m, delta = 40_000, 1e-5
    guesses, sigma = planned_guesses(m, epsilon=1.0, delta=delta), noise_for(1.0, delta, 1)
    half, whole = (int(guesses * expected_accuracy(guesses / m, times / sigma)) for times in (2.0, 1.0))
    assert epsilon_lower_bound(m, guesses, half, delta=delta) > 1.25
    assert 0.5 < epsilon_lower_bound(m, guesses, whole, delta=delta) < 0.8

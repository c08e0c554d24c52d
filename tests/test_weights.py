"""The weights of router-aware FedAvg: algebra by hypothesis, formulas against slow loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fl_server.router_aware import combine
from fl_server.weights import balance_step, expert_weights, plain_share, step_sizes, usage_share, usage_spread, water_fill
from icmoe.study import Aggregation

PLAIN = Aggregation(usage_exponent=0.0, floor=0.0, cap=1.0, min_contributors=1, shrinkage=False, balance_step=0.0)
NEAR = 1e-12

sizes = st.integers(1, 5000)
parts = st.one_of(st.just(0.0), st.floats(1e-6, 1.0))


@st.composite
def federations(draw):
    """Return sizes of 1 to 6 sites and their usage of 1 to 5 experts; some experts are used by nobody."""
    sites, experts = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    size_S = np.array(draw(st.lists(sizes, min_size=sites, max_size=sites)), dtype=np.float64)
    rows = draw(st.lists(st.lists(parts, min_size=experts, max_size=experts), min_size=sites, max_size=sites))
    idle = draw(st.sets(st.integers(1, experts - 1), max_size=2)) if experts > 1 else set()
    usage_SM = np.array(rows, dtype=np.float64)
    usage_SM[:, sorted(idle)] = 0.0
    usage_SM[usage_SM.sum(axis=1) == 0.0, 0] = 1.0
    return size_S, usage_SM / usage_SM.sum(axis=1, keepdims=True)


aggregations = st.builds(
    Aggregation,
    usage_exponent=st.sampled_from([0.0, 0.5, 1.0, 2.0, 4.0]),
    floor=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    cap=st.sampled_from([0.05, 0.3, 0.5, 0.9, 1.0]),
    min_contributors=st.integers(1, 4),
    starved=st.sampled_from(["keep", "plain"]),
    shrinkage=st.booleans(),
)


def slow_water_fill(share_S: list[float], cap: float) -> list[float]:
    """Find by bisection the factor f with sum_k min(cap, f share_k) = 1."""
    positive = [share for share in share_S if share > 0.0]
    if len(positive) * cap < 1.0:
        rest = (1.0 - cap * len(positive)) / (len(share_S) - len(positive))
        return [cap if share > 0.0 else rest for share in share_S]
    low, high = 1.0, 1.0 / min(positive)
    for _ in range(200):
        middle = (low + high) / 2.0
        if sum(min(cap, middle * share) for share in share_S) < 1.0:
            low = middle
        else:
            high = middle
    return [min(cap, high * share) for share in share_S]


def slow_weights(size_S, usage_SM, settings):
    """Return shares, steps and contributors by the formulas, one expert and one site at a time."""
    sites, experts = usage_SM.shape
    total = sum(size_S)
    share_SM, step_M, contributors_M = np.zeros((sites, experts)), np.ones(experts), np.zeros(experts, int)
    for e in range(experts):
        mass = [size_S[k] * usage_SM[k, e] ** settings.usage_exponent for k in range(sites)]
        share = [part / sum(mass) if sum(mass) else size_S[k] / total for k, part in enumerate(mass)]
        share = [max(part, settings.floor * size_S[k] / total) for k, part in enumerate(share)]
        share = slow_water_fill([part / sum(share) for part in share], max(settings.cap, 1.0 / sites))
        used = sum(size_S[k] * usage_SM[k, e] for k in range(sites))
        if settings.shrinkage:
            step_M[e] = min(1.0, used / (0.05 * total / experts))
        contributors_M[e] = sum(usage_SM[k, e] > settings.min_usage for k in range(sites))
        if settings.usage_exponent > 0.0 and contributors_M[e] < settings.min_contributors:
            share = [size_S[k] / total for k in range(sites)]
            step_M[e] = 0.0 if settings.starved == "keep" else step_M[e]
        share_SM[:, e] = share
    return share_SM, step_M, contributors_M


@given(federations(), aggregations)
def test_weights_equal_the_formulas_written_as_loops(federation, settings):
    weights = expert_weights(*federation, settings)
    share_SM, step_M, contributors_M = slow_weights(*federation, settings)
    np.testing.assert_allclose(weights.share_SM, share_SM, atol=1e-9)
    np.testing.assert_allclose(weights.step_M, step_M, atol=NEAR)
    np.testing.assert_array_equal(weights.contributors_M, contributors_M)


@given(federations(), aggregations)
def test_every_column_sums_to_one_and_steps_stay_in_the_unit_interval(federation, settings):
    weights = expert_weights(*federation, settings)
    np.testing.assert_allclose(weights.share_SM.sum(axis=0), 1.0, atol=NEAR)
    assert (weights.share_SM >= 0.0).all()
    assert ((weights.step_M >= 0.0) & (weights.step_M <= 1.0)).all()


@given(federations(), aggregations)
def test_no_site_passes_the_cap_and_each_keeps_its_floor(federation, settings):
    size_S, usage_SM = federation
    settings = settings.model_copy(update={"min_contributors": 0})
    share_SM = expert_weights(size_S, usage_SM, settings).share_SM
    cap = max(settings.cap, 1.0 / len(size_S))
    # The floor is taken before normalisation, which divides by at most 1 + eta.
    floor_S = np.minimum(cap, settings.floor * size_S / size_S.sum() / (1.0 + settings.floor))
    assert (share_SM <= cap + NEAR).all()
    assert (share_SM >= floor_S[:, None] - NEAR).all()


@given(federations())
def test_plain_settings_are_fedavg(federation):
    size_S, usage_SM = federation
    weights = expert_weights(size_S, usage_SM, PLAIN)
    np.testing.assert_allclose(
        weights.share_SM, np.repeat((size_S / size_S.sum())[:, None], usage_SM.shape[1], axis=1), atol=NEAR
    )
    assert (weights.step_M == 1.0).all()


@given(federations(), aggregations, st.randoms(use_true_random=False))
def test_a_permutation_of_the_sites_permutes_the_weights(federation, settings, random):
    size_S, usage_SM = federation
    order = list(range(len(size_S)))
    random.shuffle(order)
    straight, permuted = expert_weights(size_S, usage_SM, settings), expert_weights(size_S[order], usage_SM[order], settings)
    np.testing.assert_allclose(permuted.share_SM, straight.share_SM[order], atol=1e-9)
    np.testing.assert_allclose(permuted.step_M, straight.step_M, atol=NEAR)


@given(federations(), st.integers(2, 9))
def test_only_the_proportions_of_the_sizes_count(federation, factor):
    size_S, usage_SM = federation
    once, scaled = expert_weights(size_S, usage_SM, Aggregation()), expert_weights(size_S * factor, usage_SM, Aggregation())
    np.testing.assert_allclose(scaled.share_SM, once.share_SM, atol=1e-9)
    np.testing.assert_allclose(scaled.step_M, once.step_M, atol=NEAR)


def test_usage_decides_on_a_napkin():
    share_SM = usage_share(np.array([100.0, 300.0]), np.array([[0.9, 0.1], [0.1, 0.9]]), 1.0)
    np.testing.assert_allclose(share_SM, [[90 / 120, 10 / 280], [30 / 120, 270 / 280]])
    squared_SM = usage_share(np.array([100.0, 300.0]), np.array([[0.9, 0.1], [0.1, 0.9]]), 2.0)
    np.testing.assert_allclose(squared_SM[:, 0], [81 / 84, 3 / 84])


def test_an_unused_expert_takes_no_step_and_a_rare_one_a_short_one():
    size_S = np.array([100.0, 300.0])
    usage_SM = np.array([[0.0, 0.0, 1.0], [0.0, 0.01, 0.99]])
    # N / M = 400 / 3, a full step needs 5 % of it = 6.667; the second expert has 3.
    np.testing.assert_allclose(step_sizes(size_S, usage_SM), [0.0, 3.0 / (0.05 * 400 / 3), 1.0])
    assert expert_weights(size_S, usage_SM, Aggregation()).step_M[0] == 0.0


@pytest.mark.parametrize(("starved", "steps"), [("plain", [1.0, 1.0]), ("keep", [1.0, 0.0])])
def test_too_few_contributors_fall_back(starved, steps):
    size_S = np.array([10.0, 20.0, 70.0])
    usage_SM = np.array([[0.5, 0.5], [0.6, 0.4], [0.99, 0.01]])
    settings = Aggregation(min_contributors=3, starved=starved, floor=0.0, cap=1.0)
    weights = expert_weights(size_S, usage_SM, settings)
    assert weights.contributors_M.tolist() == [3, 2]
    np.testing.assert_allclose(weights.share_SM[:, 0], np.array([5.0, 12.0, 69.3]) / 86.3)
    np.testing.assert_allclose(weights.share_SM[:, 1], [0.1, 0.2, 0.7])
    assert weights.step_M.tolist() == steps


def test_usage_at_the_threshold_is_no_contribution():
    usage_SM = np.array([[0.98, 0.02], [0.5, 0.5]])
    assert expert_weights(np.ones(2), usage_SM, Aggregation(min_usage=0.02)).contributors_M.tolist() == [2, 1]


@given(st.lists(parts, min_size=1, max_size=8).filter(lambda row: sum(row) > 0.0), st.floats(0.0, 1.0))
def test_water_fill_equals_a_slow_reference(row, position):
    share_S = np.array(row) / sum(row)
    cap = 1.0 / len(row) + position * (1.0 - 1.0 / len(row))
    kept_S = share_S.copy()
    filled_S = water_fill(share_S, cap)
    np.testing.assert_allclose(filled_S, slow_water_fill(share_S.tolist(), cap), atol=1e-9)
    assert math.isclose(filled_S.sum(), 1.0, abs_tol=NEAR)
    np.testing.assert_array_equal(share_S, kept_S)


def test_water_fill_needs_a_second_pass():
    np.testing.assert_allclose(water_fill(np.array([0.6, 0.35, 0.05]), 0.4), [0.4, 0.4, 0.2])


@given(federations(), st.floats(0.0, 1.0), st.integers(0, 2**32 - 1))
def test_balance_bias_is_centred_and_moves_towards_even_use(federation, step, seed):
    size_S, usage_SM = federation
    experts = usage_SM.shape[1]
    before_M = np.random.default_rng(seed).normal(size=experts)
    before_M -= before_M.mean()
    moved_M = balance_step(before_M, size_S, usage_SM, step) - before_M
    mean_M = [sum(size_S[k] * usage_SM[k, e] for k in range(len(size_S))) / sum(size_S) for e in range(experts)]
    wanted_M = np.array([step * max(-1.0, min(1.0, 1.0 - experts * mean)) for mean in mean_M])
    np.testing.assert_allclose(moved_M, wanted_M - wanted_M.mean(), atol=1e-9)
    assert abs((before_M + moved_M).sum()) < 1e-9
    # An expert that is used less than another never loses ground to it.
    by_use = np.argsort(mean_M)
    assert (np.diff(moved_M[by_use]) <= 1e-9).all()


def test_balance_bias_rests_at_even_use():
    np.testing.assert_allclose(balance_step(np.zeros(4), np.array([3.0, 9.0]), np.full((2, 4), 0.25), 0.5), 0.0, atol=NEAR)


def test_spread_of_usage():
    assert usage_spread(np.full((3, 2), 0.5)) == 0.0
    assert usage_spread(np.array([[1.0, 0.0], [0.0, 1.0]])) == pytest.approx(0.5)
    # Equal sites have no spread, however unevenly they use their experts.
    assert usage_spread(np.array([[0.9, 0.1], [0.9, 0.1]])) == 0.0
    assert usage_spread(np.array([[0.8, 0.2], [0.4, 0.6], [0.6, 0.4]])) == pytest.approx((0.08 / 3) ** 0.5)
    assert usage_spread(np.zeros((3, 0))) == 0.0


def test_plain_share():
    np.testing.assert_allclose(plain_share(np.array([1.0, 3.0])), [0.25, 0.75])


@pytest.mark.parametrize("size", [11, 12, 13])
def test_a_tensor_that_is_added_in_pieces_is_added_whole(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fl_server.router_aware.PIECE", 4)
    rng = np.random.default_rng(size)
    tensor, *deltas = rng.normal(size=(3, size)).astype(np.float32)
    found = combine(tensor, deltas, np.array([0.25, 0.75]), 0.5)
    np.testing.assert_allclose(found, tensor + 0.125 * deltas[0] + 0.375 * deltas[1], atol=1e-6)

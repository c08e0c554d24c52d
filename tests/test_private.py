"""Differential privacy at the server: sensitivity, noise, adaptive clipping, accounting over rounds, the checkpoint."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from test_rounds import ROSTER, SITES, Wire, honest

from fl_client.incoming import bound_faults
from fl_server.aggregate import IDENTITY, in_one_reply
from fl_server.app import make_strategy, start_state
from fl_server.private import Private, contribution, next_clip_norm, norm_of, summed
from fl_server.replies import Update
from fl_server.round_strategy import unheard
from fl_server.rounds import run_rounds
from fl_server.router_aware import RouterAware
from fl_server.run_state import RunState, latest_state
from fl_server.submit import sentence
from icmoe.errors import IcmoeError
from icmoe.gaussian import delta_of, epsilon_of, noise_for
from icmoe.kinds import BALANCE_BIAS, expert_of, is_usage_weighted
from icmoe.os_random import gaussian
from icmoe.server_noise import noise_of
from icmoe.study import Study

PLAIN = {"cap": 1.0, "min_contributors": 1, "shrinkage": False, "balance_step": 0.0, "largest_size": 30}


def private_study(make_study, rounds: int = 3, aggregation: dict[str, Any] | None = None, **server: Any) -> Study:
    base = {"noise_multiplier": 1.0, "delta": 1e-3, "sites": 3, "divisor": 2.0, "clip_norm": 0.5}
    chosen = {key: value for key, value in {**base, **server}.items() if value is not None}
    return make_study(rounds=rounds, aggregation={**PLAIN, **(aggregation or {})}, privacy={"server": chosen})


@st.composite
def anything(draw, study: Study) -> Update:
    """An update as bad as the checks let through: any finite tensors, any size, any usage on the simplex."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    scale = draw(st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 1e6, 1e18]))
    weights = np.array(draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 100.0]), min_size=3, max_size=3).filter(sum)))
    shapes = {name: tensor.shape for name, tensor in start_state(study).arrays.items() if name != BALANCE_BIAS}
    return Update(
        site=draw(st.sampled_from("abcdef")),
        size=draw(st.sampled_from([1, 10, 30, 10**6])),
        usage_M=tuple(weights / weights.sum()),
        loss=0.5,
        steps=1,
        train_s=0.1,
        size_bytes=1,
        tensors={name: (scale * rng.normal(size=shape)).astype(np.float32) for name, shape in shapes.items()},
    )


def distance(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> float:
    names = {*left, *right}
    return norm_of({name: left.get(name, 0.0) - right.get(name, np.zeros(())) for name in names})


@given(data=st.data(), exponent=st.sampled_from([0.0, 1.0, 2.0]), clip=st.sampled_from([1e-3, 0.5, 40.0]))
@settings(max_examples=60, deadline=None)
def test_one_site_changes_the_sum_by_no_more_than_the_bound(data, exponent: float, clip: float, make_study) -> None:
    """Add or remove a site: C w_max; put any other in its place: twice that. Whatever the others and the site itself send."""
    most = data.draw(st.sampled_from([0.5, 1.0, 2.5]))
    study = private_study(make_study, aggregation={"usage_exponent": exponent}, max_weight=most, clip_norm=clip)
    others = data.draw(st.lists(anything(study), max_size=3))
    one, another = data.draw(anything(study)), data.draw(anything(study))
    place, bound = data.draw(st.integers(0, len(others))), clip * most
    without = summed(others, study, clip)
    with_one = summed([*others[:place], one, *others[place:]], study, clip)
    with_another = summed([*others[:place], another, *others[place:]], study, clip)
    assert distance(with_one, without) <= bound * (1 + 1e-9)
    assert distance(with_one, with_another) <= 2 * bound * (1 + 1e-9)


def test_the_bound_is_reached_so_it_is_not_idle(make_study) -> None:
    study = private_study(make_study, aggregation={"usage_exponent": 0.0})
    shapes = {name: tensor.shape for name, tensor in start_state(study).arrays.items() if name != BALANCE_BIAS}
    tensors = {name: np.full(shape, 9.0, np.float32) for name, shape in shapes.items()}
    big = Update(site="a", size=30, usage_M=(1.0, 0.0, 0.0), loss=0, steps=1, train_s=0, size_bytes=1, tensors=tensors)
    assert norm_of(contribution(big, study, 0.5)) == pytest.approx(0.5)


def test_weights_follow_usage_and_size_up_to_the_largest(make_study) -> None:
    study = private_study(make_study, aggregation={"floor": 0.1}, max_weight=1.5, clip_norm=1e6)
    usage_M = (0.1, 0.2, 0.7)
    shapes = {name: tensor.shape for name, tensor in start_state(study).arrays.items() if name != BALANCE_BIAS}
    tensors = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    update = Update(site="a", size=15, usage_M=usage_M, loss=0, steps=1, train_s=0, size_bytes=1, tensors=tensors)
    for name, part in contribution(update, study, 1e6).items():
        weighed = is_usage_weighted(name, study.model)
        wanted = 0.5 * (0.9 * 3 * usage_M[expert_of(name)] + 0.1) if weighed else 0.5
        np.testing.assert_allclose(part, min(1.5, wanted))


def test_zero_updates_and_integer_arrays_are_nothing_special() -> None:
    assert norm_of({"a": np.zeros(3, np.float32), "b": np.zeros((), np.int64)}) == 0.0
    assert norm_of({"a": np.array([3, 4], np.int32), "b": np.array(12, np.int64)}) == pytest.approx(13.0)


def test_a_zero_update_moves_nothing_and_integers_stay_integers(make_study) -> None:
    study = private_study(make_study)
    zero = Update(
        site="a",
        size=10,
        usage_M=(1.0, 0.0, 0.0),
        loss=0.0,
        steps=1,
        train_s=0.0,
        size_bytes=1,
        tensors={"x": np.zeros(4, np.float32), "count": np.array([7], np.int64)},
    )
    silent = Update(**{**{slot: getattr(zero, slot) for slot in zero.__slots__}, "tensors": {"x": np.zeros(4, np.float32)}})
    assert norm_of(contribution(silent, study, 0.5)) == 0.0
    assert norm_of(contribution(zero, study, 0.5)) <= 0.5
    current = {"x": np.zeros(1, np.float32), "count": np.zeros(1, np.int64)}
    reply = in_one_reply({"x": np.array([0.25]), "count": np.array([2.6])}, current, SITES, study)
    assert [(array.numpy().dtype, array.numpy()[0]) for _, array in sorted(reply.content["update"].items())] == [
        (np.int64, 3),
        (np.float32, 0.25),
    ]


def configured(study: Study) -> tuple[Private, list]:
    strategy = Private(RouterAware(study, SITES, ROSTER.sizes, IDENTITY), study, SITES)
    return strategy, replies_to(strategy, study, 1)


def replies_to(strategy: Private, study: Study, number: int) -> list:
    wire = Wire(honest)
    arrays = ArrayRecord({name: Array(tensor) for name, tensor in start_state(study).arrays.items()})
    return list(wire.pull_messages(wire.push_messages(strategy.configure_train(number, arrays, ConfigRecord(), grid=None))))


@pytest.mark.parametrize("adjacency", ["add/remove", "replace"])
@pytest.mark.parametrize("quantile", [None, 0.5])
def test_the_noise_has_the_promised_size(adjacency: str, quantile: float | None, make_study) -> None:
    study = private_study(make_study, adjacency=adjacency, clip_quantile=quantile, count_noise=1.0, max_weight=1.5)
    strategy, replies = configured(study)
    start = start_state(study).arrays
    quiet, _ = _without_noise(study, replies)
    moved, _ = strategy.aggregate_train(1, replies)
    noise = np.concatenate([(moved[name].numpy() - quiet[name]).reshape(-1) for name in start if name != BALANCE_BIAS])
    split = 1.0 if quantile is None else (1.0 - 0.25) ** -0.5
    deviation = split * 0.5 * 1.5 * (2 if adjacency == "replace" else 1) / 2.0
    # 5 standard errors of the standard deviation: wrong by half or by sqrt(2) is far outside.
    assert noise.std() == pytest.approx(deviation, rel=5 / math.sqrt(2 * noise.size))
    assert abs(noise.mean()) < 5 * deviation / math.sqrt(noise.size)
    assert stats.kstest(noise / deviation, "norm").pvalue > 1e-6


def _without_noise(study: Study, replies: list) -> tuple[dict[str, np.ndarray], None]:
    from fl_server.replies import parse_replies

    start = start_state(study).arrays
    total = summed(parse_replies(replies, SITES, study, start)[0], study, 0.5)
    return {name: start[name] + total[name] / 2.0 if name in total else start[name] for name in start}, None


def test_the_noise_is_another_one_each_time_whatever_the_seeds(make_study) -> None:
    study, found = private_study(make_study), []
    for _ in range(2):
        np.random.seed(0)  # noqa: NPY002  (the state that Flower's own wrappers draw from)
        strategy, replies = configured(study)
        found.append(strategy.aggregate_train(1, replies)[0])
    names = [name for name in found[0] if name != BALANCE_BIAS]
    assert not any(np.array_equal(found[0][name].numpy(), found[1][name].numpy()) for name in names)
    first, second = (np.concatenate([one[name].numpy().reshape(-1) for name in names]) for one in found)
    start = np.concatenate([start_state(study).arrays[name].reshape(-1) for name in names])
    assert abs(np.corrcoef(first - start, second - start)[0, 1]) < 0.2


def test_normal_values_from_the_system_are_normal_and_independent() -> None:
    values = gaussian(200_000)
    assert stats.kstest(values, "norm").pvalue > 1e-6
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.02
    assert values.shape == (200_000,)
    assert gaussian(0).shape == (0,)


def test_c_follows_the_quantile_as_published() -> None:
    """Andrew et al., algorithm 1: after many rounds the share of norms below C is the quantile asked for."""
    from icmoe.server_privacy import ServerPrivacy

    settings_ = ServerPrivacy(noise_multiplier=0.5, delta=1e-3, sites=200, divisor=100.0, clip_quantile=0.7)
    rng = np.random.default_rng(0)
    norms, clip, found = rng.lognormal(1.0, 0.5, 200), 0.01, []
    for _ in range(200):
        clip = next_clip_norm(clip, float(np.sum((norms <= clip) - 0.5)) + rng.normal(0, 10.0), settings_)
        found.append(clip)
    assert np.mean(np.mean(norms[:, None] <= np.array(found[100:]), axis=0)) == pytest.approx(0.7, abs=0.03)
    assert next_clip_norm(1.0, 100.0, settings_) == pytest.approx(math.exp(-0.2 * (1.0 - 0.7)))
    assert next_clip_norm(1.0, -100.0, settings_) == pytest.approx(math.exp(0.2 * 0.7))


def test_c_follows_a_noised_count_and_a_run_that_goes_on_takes_it_up(make_study, tmp_path: Path) -> None:
    study, off = private_study(make_study, rounds=40, clip_norm=1e5, clip_quantile=0.5, count_noise=4.0), []
    strategy, replies = configured(study)
    for number in range(1, 41):
        before = strategy.clip_norm
        strategy.aggregate_train(number, replies)
        off.append(math.log(before / strategy.clip_norm) / 0.2 * 3 - 1.5)  # all three updates are left whole
    assert np.std(off) == pytest.approx(4.0, rel=5 / math.sqrt(2 * 40))
    RunState(study.digest, start_state(study).arrays, extra=strategy.state()).commit(tmp_path / "s")
    again, _ = configured(study)
    again.load_state(RunState.load(tmp_path / "s", study).extra)
    assert (again.releases, again.clip_norm) == (40, strategy.clip_norm)


def test_sum_and_count_together_cost_what_is_charged(make_study) -> None:
    server = private_study(make_study, clip_quantile=0.5, count_noise=2.0, noise_multiplier=1.3).privacy.server
    noise = noise_of(server, 3)
    # Two Gaussian releases with multipliers a and b are one with (a^-2 + b^-2)^(-1/2); the count's sensitivity is 1/2.
    assert (noise.update**-2 + (noise.count / 0.5) ** -2) ** -0.5 == pytest.approx(1.3)
    # Another site in a place changes sum and count by twice as much; `Noise.update` is in units of the sum's sensitivity.
    replaced = noise_of(server.model_copy(update={"adjacency": "replace"}), 3)
    assert (replaced.update**-2 + (replaced.count / 1.0) ** -2) ** -0.5 == pytest.approx(1.3)
    assert noise_of(private_study(make_study, clip_quantile=0.5, sites=60).privacy.server, 3).count == 60 / 20
    with pytest.raises(IcmoeError) as caught:
        noise_of(private_study(make_study, clip_quantile=0.5, count_noise=0.65, noise_multiplier=1.3).privacy.server, 3)
    assert caught.value.faults[0].number == 421  # at half of it already


@pytest.mark.parametrize(("releases", "z"), [(1, 1.0), (10, 2.0), (100, 5.0), (100, 0.7)])
def test_epsilon_is_that_of_the_gaussian_mechanism(releases: int, z: float) -> None:
    epsilon = epsilon_of(releases, z, 1e-5)
    mu = math.sqrt(releases) / z
    grid = np.linspace(-40, 40 + mu, 2_000_001)
    density, shifted = stats.norm.pdf(grid), stats.norm.pdf(grid - mu)
    hockey = np.sum(np.maximum(shifted - math.exp(epsilon) * density, 0)) * (grid[1] - grid[0])
    assert hockey == pytest.approx(1e-5, rel=1e-3)
    assert delta_of(epsilon, releases, z) <= 1e-5
    assert noise_for(epsilon, 1e-5, releases) == pytest.approx(z, rel=1e-6)


def test_hardly_any_noise_has_a_finite_epsilon_until_none_is_worth_a_number() -> None:
    mu = math.sqrt(100) / 0.01
    assert epsilon_of(100, 0.01, 1e-5) == pytest.approx(mu**2 / 2 + mu * stats.norm.isf(1e-5), rel=1e-3)
    assert epsilon_of(100, 1e-4, 1e-5) == math.inf


def test_epsilon_equals_opacus_to_a_percent() -> None:
    pytest.importorskip("opacus")
    from icmoe.accounting import Spending, epsilon

    for releases, z in ((10, 2.0), (50, 8.0)):
        theirs = epsilon([Spending(z, 1.0, releases)], delta=1e-5, accountant="prv")
        assert epsilon_of(releases, z, 1e-5) == pytest.approx(theirs, rel=0.01)


def play(study: Study, path: Path) -> RunState:
    state = RunState.load(path, study) if path.exists() else start_state(study)
    strategy, grid = make_strategy(study, ROSTER), Wire(honest)
    return run_rounds(grid, strategy, study, state, sites=SITES, commit=lambda now: now.commit(path), poll_s=0.005)


def test_spending_is_in_every_record_and_in_the_checkpoint(make_study, tmp_path: Path) -> None:
    study = private_study(make_study, rounds=3, clip_quantile=0.5, count_noise=2.0)
    state = play(study, tmp_path / "s")
    spent = [row["privacy"] for row in state.history]
    assert [row["epsilon"] for row in spent] == [epsilon_of(number, 1.0, 1e-3) for number in (1, 2, 3)]
    assert {row["unit"] for row in spent} == {"site"}
    line = sentence(state.history[-1], study)
    assert f"epsilon {epsilon_of(3, 1.0, 1e-3):.3f} at delta 0.001 per site (add/remove; Gaussian, exact" in line
    loaded = RunState.load(tmp_path / "s", study)
    strategy = make_strategy(study, ROSTER).inner
    strategy.load_state(loaded.extra)
    assert strategy.releases == 3
    assert strategy.clip_norm != spent[-1]["clip_norm"]
    assert spent[0]["clip_norm"] == 0.5 != spent[1]["clip_norm"]


def test_a_study_whose_rounds_would_cross_its_epsilon_does_not_start(make_study) -> None:
    study = private_study(make_study, rounds=50, epsilon=8.0)
    with pytest.raises(IcmoeError) as caught:
        make_strategy(study, ROSTER)
    (fault,) = caught.value.faults
    fitting = max(count for count in range(50) if epsilon_of(count, 1.0, 1e-3) <= 8.0)
    assert (fault.number, fault.limit) == (420, "8")
    assert f"{fitting} rounds fit" in str(fault)
    least = epsilon_of(50, 1.0, 1e-3)
    make_strategy(private_study(make_study, rounds=50, epsilon=least), ROSTER)
    with pytest.raises(IcmoeError, match="49 rounds fit"):
        make_strategy(private_study(make_study, rounds=50, epsilon=least * (1 - 1e-7)), ROSTER)


def test_a_run_stops_before_the_round_that_would_cross_its_epsilon(make_study) -> None:
    study = private_study(make_study, rounds=3, noise_multiplier=None, epsilon=5.0)
    strategy = make_strategy(study, ROSTER)
    assert strategy.inner.epsilon(3) <= 5.0
    state = start_state(study)
    state.extra = {"private.releases": np.array([3]), "private.clip_norm": np.array([0.5])}  # spent already, as a commit says
    wire = Wire(honest)
    with pytest.raises(IcmoeError) as caught:
        run_rounds(wire, strategy, study, state, sites=SITES, commit=unheard, poll_s=0.005)
    assert caught.value.faults[0].number == 420
    assert not wire.asked


def test_an_older_commit_is_no_way_to_spend_twice(make_study, tmp_path: Path) -> None:
    """A round that is repeated is released a second time, and an older commit would not count the first."""
    path = tmp_path / "study.state.safetensors"
    for study, usable in ((make_study(), True), (private_study(make_study), False)):
        for number in (1, 2):
            state = start_state(study)
            state.round = number
            state.commit(path, keep=3)
        path.unlink()
        path.write_bytes(b"damaged")
        if usable:
            assert latest_state(path, study).round == 2
            continue
        with pytest.raises(IcmoeError) as caught:
            latest_state(path, study)
        assert caught.value.faults[0].number == 502


def test_below_the_quorum_nothing_is_released_or_spent(make_study) -> None:
    study = private_study(make_study)
    strategy, _ = configured(study)
    assert strategy.aggregate_train(1, []) == (None, None)
    assert strategy.releases == 0


@pytest.mark.parametrize("key", ["cap", "min_contributors", "shrinkage", "balance_step"])
def test_a_private_study_may_not_couple_its_sites(key: str, make_study) -> None:
    with pytest.raises(IcmoeError, match="nothing may depend on the sites together"):
        private_study(make_study, aggregation={key: {"cap": 0.5, "min_contributors": 2, "shrinkage": True}.get(key, 0.1)})


@pytest.mark.parametrize(
    "change", [{"epsilon": 0.0}, {"epsilon": -1.0}, {"delta": 0.5}, {"noise_multiplier": None}, {"clip_norm": 0.0}]
)
def test_a_promise_that_is_none_is_refused(change: dict[str, Any], make_study) -> None:
    with pytest.raises(IcmoeError) as caught:
        private_study(make_study, **change)
    assert caught.value.faults[0].number == 202


def test_delta_may_be_one_in_the_sites(make_study) -> None:
    assert private_study(make_study, sites=128, delta=1 / 128).privacy.server.delta == 1 / 128


@pytest.mark.parametrize("server", [{}, {"clip_quantile": 0.9, "count_noise": 2.0}, {"adjacency": "replace", "max_weight": 3.0}])
def test_a_site_bears_the_noise_that_the_study_says_however_small_its_learning_rate(server: dict[str, Any], make_study) -> None:
    study = private_study(make_study, rounds=4, **server)
    study = study.model_copy(update={"training": study.training.model_copy(update={"learning_rate": 1e-6})})
    models = [start_state(study).arrays]
    run_rounds(
        Wire(honest),
        make_strategy(study, ROSTER),
        study,
        start_state(study),
        sites=SITES,
        commit=lambda now: models.append(dict(now.arrays)),
        poll_s=0.005,
    )
    first, *later = ({name: torch.from_numpy(one) for name, one in model.items()} for model in models)
    last = first
    for model in later:
        assert bound_faults(study, model, last, rounds=1) == []
        last = model
    assert bound_faults(study, last, first, rounds=study.rounds) == []
    far = {name: tensor + 1e3 for name, tensor in last.items()}
    assert {fault.number for fault in bound_faults(study, far, last, rounds=1)} == {322}


def test_the_noise_that_a_site_bears_grows_with_the_root_of_the_rounds(make_study) -> None:
    study = private_study(make_study, rounds=16, noise_multiplier=1.0, clip_norm=0.5, divisor=2.0)
    study = study.model_copy(update={"training": study.training.model_copy(update={"learning_rate": 1e-6})})
    start = {name: torch.from_numpy(one) for name, one in start_state(study).arrays.items()}
    for rounds, deviation in ((1, 0.25), (4, 0.5), (9, 0.75)):
        near, far = ({name: one + 8.0 * share * deviation for name, one in start.items()} for share in (0.95, 1.05))
        assert bound_faults(study, near, start, rounds=rounds) == []
        assert {fault.where for fault in bound_faults(study, far, start, rounds=rounds)} == set(start)


def test_an_optimiser_takes_the_noised_mean(make_study, tmp_path: Path) -> None:
    study = private_study(make_study, aggregation={"optimizer": "adam"})
    state = play(study, tmp_path / "s")
    assert state.round == 3
    assert {"private.releases", "guard.memory"} < set(state.extra)
    assert any(name.startswith("optimizer.m.") for name in state.extra)

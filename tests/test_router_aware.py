"""Router-aware FedAvg as a Flower strategy: beside Flower's own FedAvg, FedAdam and FedYogi, and against bad replies."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam, FedAvg, FedYogi
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_server.app import make_strategy, start_state
from fl_server.replies import parse_replies
from fl_server.roster import Roster
from fl_server.round_strategy import record_of
from fl_server.router_aware import RouterAware, combine
from fl_server.weights import expert_weights
from icmoe.kinds import BALANCE_BIAS, expert_of, is_usage_weighted
from icmoe.messages import ARRAYS, CONFIG, NUMBERS, UPDATE
from icmoe.study import Study

SITES = {1: "Alder", 2: "Birch", 3: "Cedar"}
PLAIN = {"usage_exponent": 0.0, "floor": 0.0, "cap": 1.0, "min_contributors": 1, "min_usage": 0.0, "shrinkage": False}
USAGE = {"Alder": [0.2, 0.7, 0.1], "Birch": [0.4, 0.5, 0.1], "Cedar": [0.3, 0.1, 0.6]}
SIZES = {"Alder": 70, "Birch": 20, "Cedar": 10}


def deltas_of(study: Study, seed: int = 0, scale: float = 0.1) -> dict[str, dict[str, np.ndarray]]:
    """Return a random update per site."""
    rng = np.random.default_rng(seed)
    shapes = {name: tensor.shape for name, tensor in start_state(study).arrays.items() if name != BALANCE_BIAS}
    return {
        site: {name: rng.normal(0, scale, shape).astype(np.float32) for name, shape in shapes.items()} for site in SITES.values()
    }


def numbers_of(site: str, **changes: Any) -> dict[str, Any]:
    base = {"slices": SIZES[site], "usage": USAGE[site], "loss": 0.5, "steps": 3, "seconds": 0.1}
    return {key: value for key, value in {**base, **changes}.items() if value is not None}


def reply_of(node: int, records: dict[str, Any]) -> Message:
    message = Message(RecordDict(records), reply_to=Message(RecordDict(), dst_node_id=node, message_type="train"))
    message.metadata.__dict__["_src_node_id"] = node
    return message


def reply(node: int, update: dict[str, np.ndarray], **changes: Any) -> Message:
    arrays = ArrayRecord({name: Array(tensor) for name, tensor in update.items()})
    return reply_of(node, {UPDATE: arrays, NUMBERS: MetricRecord(numbers_of(SITES[node], **changes))})


def sent(study: Study, updates: dict[str, dict[str, np.ndarray]]) -> list[Message]:
    return [reply(node, updates[site]) for node, site in SITES.items()]


def configured(study: Study) -> RouterAware:
    strategy = RouterAware(study, SITES, SIZES)
    arrays = ArrayRecord({name: Array(tensor) for name, tensor in start_state(study).arrays.items()})
    strategy.configure_train(1, arrays, ConfigRecord(), grid=None)
    return strategy


def moved(strategy, replies: list[Message]) -> dict[str, np.ndarray]:
    arrays, _ = strategy.aggregate_train(1, replies)
    assert arrays is not None
    return {name: array.numpy() for name, array in arrays.items()}


def flower_replies(start: dict[str, np.ndarray], updates: dict[str, dict[str, np.ndarray]]) -> list[Message]:
    """Return what Flower's own strategies want: whole models and an example count."""
    return [
        reply_of(
            node,
            {
                ARRAYS: ArrayRecord({name: Array(start[name] + delta) for name, delta in updates[site].items()}),
                "metrics": MetricRecord({"num-examples": SIZES[site]}),
            },
        )
        for node, site in SITES.items()
    ]


@pytest.mark.parametrize("seed", range(5))
def test_with_t_zero_it_is_flowers_fedavg(seed: int, make_study) -> None:
    study = make_study(aggregation=PLAIN)
    updates = deltas_of(study, seed)
    ours = moved(configured(study), sent(study, updates))
    arrays, _ = FedAvg().aggregate_train(1, flower_replies(start_state(study).arrays, updates))
    assert set(arrays) == set(ours) - {BALANCE_BIAS}
    for name, array in arrays.items():
        # Rounding alone: ours adds weighted deltas, Flower's averages whole models.
        np.testing.assert_allclose(ours[name], array.numpy(), rtol=0, atol=3e-7)


def test_with_t_one_an_expert_follows_the_sites_that_use_it(make_study) -> None:
    study = make_study(aggregation={**PLAIN, "usage_exponent": 1.0, "balance_step": 0.0})
    updates, start = deltas_of(study), start_state(study).arrays
    ours = moved(configured(study), sent(study, updates))
    for name, tensor in ours.items():
        if name == BALANCE_BIAS:
            continue
        expert = expert_of(name)
        use = [USAGE[site][expert] if is_usage_weighted(name, study.model) else 1.0 for site in SITES.values()]
        mass = np.array([SIZES[site] * u for site, u in zip(SITES.values(), use, strict=True)])
        step = sum(w * updates[site][name].astype(np.float64) for w, site in zip(mass / mass.sum(), SITES.values(), strict=True))
        np.testing.assert_allclose(tensor, start[name] + step, rtol=0, atol=3e-7)


def test_the_defaults_take_their_weights_from_expert_weights(make_study) -> None:
    study = make_study()
    updates, start = deltas_of(study), start_state(study).arrays
    strategy = configured(study)
    ours = moved(strategy, sent(study, updates))
    usage_SM = np.array([USAGE[site] for site in SITES.values()])
    weights = expert_weights(np.array([70.0, 20.0, 10.0]), usage_SM, study.aggregation)
    np.testing.assert_array_equal(strategy.report.weights.share_SM, weights.share_SM)
    name = next(name for name in start if name.startswith("experts.2.") and "weight" in name)
    shares = weights.share_SM[:, 2]
    step = sum(share * updates[site][name].astype(np.float64) for share, site in zip(shares, SITES.values(), strict=True))
    np.testing.assert_allclose(ours[name], start[name] + weights.step_M[2] * step, rtol=0, atol=3e-7)


def test_the_order_of_arrival_does_not_change_a_bit(make_study) -> None:
    study = make_study()
    replies = sent(study, deltas_of(study))
    straight, turned = moved(configured(study), replies), moved(configured(study), replies[::-1])
    assert all(np.array_equal(straight[name], turned[name]) for name in straight)


def test_an_expert_that_nobody_used_stays_as_it_is(make_study) -> None:
    study = make_study()
    updates, start = deltas_of(study), start_state(study).arrays
    replies = [reply(node, updates[site], usage=[0.5, 0.5, 0.0]) for node, site in SITES.items()]
    ours = moved(configured(study), replies)
    unused = [name for name in start if expert_of(name) == 2]
    assert unused
    assert all(np.array_equal(ours[name], start[name]) for name in unused)
    assert not any(np.array_equal(ours[name], start[name]) for name in start if expert_of(name) == 1)


def test_the_balance_bias_favours_the_expert_that_is_used_least(make_study) -> None:
    study = make_study()
    bias_M = moved(configured(study), sent(study, deltas_of(study)))[BALANCE_BIAS]
    assert bias_M.argmax() == 2
    assert bias_M.sum() == pytest.approx(0.0, abs=1e-6)


def test_personal_parts_of_the_global_model_never_move(make_study) -> None:
    study = make_study(aggregation={"personal": True})
    start = start_state(study).arrays
    kept = {name for name in start if name.startswith(("router.", "experts.2."))}
    updates = {
        site: {name: delta for name, delta in update.items() if name not in kept} for site, update in deltas_of(study).items()
    }
    ours = moved(configured(study), sent(study, updates))
    assert kept
    assert all(np.array_equal(ours[name], start[name]) for name in kept)
    refused = reply(1, deltas_of(study)["Alder"])
    assert parse_replies([refused], SITES, study, start)[1][0].number == 504


def test_without_any_update_nothing_comes_back(make_study) -> None:
    strategy = configured(make_study())
    assert strategy.aggregate_train(1, []) == (None, None)
    assert strategy.report.updates == []


def without(update: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    return {key: value for key, value in update.items() if key != name}


def bad_replies(study: Study) -> dict[str, Message]:
    good = deltas_of(study)["Birch"]
    name = sorted(good)[0]
    poisoned = np.full_like(good[name], np.inf)
    numbers = {
        "no usage": {"usage": None},
        "usage of two experts": {"usage": [0.5, 0.5]},
        "usage off the simplex": {"usage": [0.5, 0.5, 0.5]},
        "negative usage": {"usage": [1.2, -0.2, 0.0]},
        "usage is NaN": {"usage": [float("nan"), 0.5, 0.5]},
        "no slices": {"slices": None},
        "zero slices": {"slices": 0},
        "negative slices": {"slices": -10},
        "slices in halves": {"slices": 10.5},
        "loss is NaN": {"loss": float("nan")},
        "loss is infinite": {"loss": float("inf")},
        "no steps": {"steps": 0},
    }
    tensors = {
        "tensor missing": without(good, name),
        "tensor unknown": {**good, "stranger": good[name]},
        "tensor of another shape": {**good, name: good[name][..., None]},
        "tensor of another type": {**good, name: good[name].astype(np.float64)},
        "tensor holds infinity": {**good, name: poisoned},
        "tensor holds NaN": {**good, name: np.full_like(poisoned, np.nan)},
        "the balance bias": {**good, BALANCE_BIAS: np.zeros(3, np.float32)},
    }
    arrays = ArrayRecord({key: Array(tensor) for key, tensor in good.items()})
    metrics = MetricRecord(numbers_of("Birch"))
    records = {
        "no numbers": {UPDATE: arrays},
        "no update": {NUMBERS: metrics},
        "an extra record": {UPDATE: arrays, NUMBERS: metrics, "features": arrays},
        "numbers of another type": {UPDATE: arrays, NUMBERS: ConfigRecord({"slices": 3})},
        "arrays of another type": {UPDATE: metrics, NUMBERS: metrics},
    }
    return {
        **{key: reply(2, good, **change) for key, change in numbers.items()},
        **{key: reply(2, update) for key, update in tensors.items()},
        **{key: reply_of(2, content) for key, content in records.items()},
    }


def test_a_bad_reply_is_refused_by_number_and_the_round_goes_on(make_study) -> None:
    study = make_study()
    good = deltas_of(study)
    expected = moved(configured(study), [reply(1, good["Alder"]), reply(3, good["Cedar"])])
    for name, bad in bad_replies(study).items():
        strategy = configured(study)
        ours = moved(strategy, [reply(1, good["Alder"]), bad, reply(3, good["Cedar"])])
        assert [(fault.number, fault.where) for fault in strategy.report.faults] == [(504, "Birch")], name
        assert strategy.report.faults[0].value, name
        assert all(np.array_equal(ours[key], expected[key]) for key in expected), name


def test_a_second_reply_or_a_stranger_is_refused(make_study) -> None:
    study = make_study()
    good = deltas_of(study)
    stranger = reply(1, good["Alder"])
    stranger.metadata.__dict__["_src_node_id"] = 99
    replies = [reply(1, good["Alder"]), reply(1, good["Birch"]), stranger]
    updates, faults = parse_replies(replies, SITES, study, start_state(study).arrays)
    assert [update.site for update in updates] == ["Alder"]
    assert np.array_equal(next(iter(updates[0].tensors.values())), good["Alder"][min(good["Alder"])])
    assert [fault.number for fault in faults] == [504, 504]


@pytest.mark.parametrize(
    ("reason", "number"),
    [("ICM302 study is not approved", 302), ("ICM999 ?", 304), ("/home/data/patient7.dcm not found", 304), ("", 304)],
)
def test_only_the_number_of_a_sites_error_is_repeated(reason: str, number: int, make_study) -> None:
    study = make_study()
    failed = Message(Error(1302, reason), reply_to=Message(RecordDict(), dst_node_id=2, message_type="train"))
    failed.metadata.__dict__["_src_node_id"] = 2
    _, faults = parse_replies([failed], SITES, study, start_state(study).arrays)
    assert (faults[0].number, faults[0].where) == (number, "Birch")
    assert "patient7" not in str(faults[0])


def test_a_message_carries_study_digest_round_and_tensors_only(make_study) -> None:
    study = make_study()
    strategy = RouterAware(study, SITES, {"Birch": 50, "Alder": 20})
    arrays = ArrayRecord({name: Array(tensor) for name, tensor in start_state(study).arrays.items()})
    messages = strategy.configure_train(4, arrays, ConfigRecord(), grid=None)
    # The largest site first, the unknown one last.
    assert [message.metadata.dst_node_id for message in messages] == [2, 1, 3]
    for message in messages:
        assert set(message.content) == {ARRAYS, CONFIG}
        assert dict(message.content[CONFIG]) == {"study": study.digest, "server-round": 4}


def test_evaluation_is_weighted_by_patients(make_study) -> None:
    rows = [{"val-dice": 0.5, "val-patients": 1}, {"val-dice": 0.8, "val-patients": 3}, {"val-dice": 0.0, "val-patients": 0}]
    replies = [reply_of(node, {NUMBERS: MetricRecord(row)}) for node, row in enumerate(rows, start=1)]
    found = configured(make_study()).aggregate_evaluate(1, replies)
    assert (found["val-dice"], found["val-patients"]) == (pytest.approx((0.5 + 3 * 0.8) / 4), 4)
    assert configured(make_study()).aggregate_evaluate(1, replies[2:]) is None


def test_evaluation_has_the_same_bits_in_any_order(make_study) -> None:
    scores = [0.253821542836829, 0.27021494370522003, 0.430753027909426, 0.24317617866004962]
    rows = [{"val-dice": dice, "val-patients": 1} for dice in scores]
    strategy = configured(make_study())
    found = {
        strategy.aggregate_evaluate(1, [reply_of(node, {NUMBERS: MetricRecord(rows[node - 1])}) for node in order])["val-dice"]
        for order in itertools.permutations((1, 2, 3, 4))
    }
    assert len(found) == 1


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6), st.floats(0, 1), st.integers(0, 99))
@settings(max_examples=50)
def test_combine_equals_a_slow_reference_and_leaves_its_inputs(shares: list[float], step: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tensor = rng.normal(size=(3, 2)).astype(np.float32)
    deltas = [rng.normal(size=(3, 2)).astype(np.float32) if rng.random() < 0.8 else None for _ in shares]
    kept = tensor.copy()
    found = combine(tensor, deltas, np.array(shares), step)
    wanted = kept.astype(np.float64)
    for share, delta in zip(shares, deltas, strict=True):
        wanted += 0.0 if delta is None else step * share * delta
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
    assert found.dtype == np.float32
    assert np.array_equal(tensor, kept)


@pytest.mark.parametrize(("name", "flower"), [("adam", FedAdam), ("yogi", FedYogi)])
def test_server_optimisers_are_flowers(name: str, flower, make_study) -> None:
    study = make_study(aggregation={**PLAIN, "optimizer": name, "server_learning_rate": 0.05, "balance_step": 0.0})
    ours, theirs = make_strategy(study, Roster(SITES, SIZES)), flower(eta=0.05, tau=1e-3)
    arrays = start_state(study).arrays
    for number in (1, 2, 3):
        updates = deltas_of(study, seed=number)
        record = ArrayRecord({key: Array(tensor) for key, tensor in arrays.items()})
        ours.configure_train(number, record, ConfigRecord(), grid=None)
        theirs.current_arrays = {key: tensor for key, tensor in arrays.items() if key != BALANCE_BIAS}
        mine, _ = ours.aggregate_train(number, sent(study, updates))
        wanted, _ = theirs.aggregate_train(number, flower_replies(arrays, updates))
        for key, value in wanted.items():
            np.testing.assert_allclose(mine[key].numpy(), value.numpy(), rtol=0, atol=2e-5)
            assert mine[key].numpy().dtype == np.float32
        arrays = {key: array.numpy() for key, array in mine.items()}


def test_a_server_optimiser_below_the_quorum_keeps_its_moments(make_study) -> None:
    study = make_study(quorum=3, aggregation={"optimizer": "adam"})
    strategy = make_strategy(study, Roster(SITES, SIZES))
    arrays = ArrayRecord({name: Array(tensor) for name, tensor in start_state(study).arrays.items()})
    replies = sent(study, deltas_of(study))
    strategy.configure_train(1, arrays, ConfigRecord(), grid=None)
    strategy.aggregate_train(1, replies)
    before = strategy.state()
    assert len(before) == 2 * (len(arrays) - 1) + 1  # both moments, and the guard's memory
    strategy.configure_train(2, arrays, ConfigRecord(), grid=None)
    assert strategy.aggregate_train(2, sent(study, deltas_of(study, seed=2))[:2]) == (None, None)
    after = strategy.state()
    assert all(np.array_equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("name", ["adam", "yogi"])
def test_an_expert_that_is_kept_is_not_moved_by_the_momentum_of_earlier_rounds(name: str, make_study) -> None:
    rule = {"optimizer": name, "min_contributors": 1, "starved": "keep", "floor": 0.0}
    study = make_study(aggregation=rule)
    strategy, arrays = make_strategy(study, Roster(SITES, SIZES)), record_of(start_state(study).arrays)
    for number, usage in ((1, [0.4, 0.3, 0.3]), (2, [0.5, 0.5, 0.0])):
        before, moments = arrays, strategy.state()
        strategy.configure_train(number, arrays, ConfigRecord(), grid=None)
        updates = deltas_of(study, seed=number)
        arrays, _ = strategy.aggregate_train(number, [reply(node, updates[site], usage=usage) for node, site in SITES.items()])
    after = strategy.state()
    still = {key for key, array in arrays.items() if np.array_equal(array.numpy(), before[key].numpy())}
    assert still == {key for key in arrays if key.startswith("experts.2.")}
    kept = [f"optimizer.{kind}.{key}" for kind in "mv" for key in still]
    assert all(np.array_equal(moments[key], after[key]) for key in kept)


def test_infinity_in_an_expert_that_does_not_move_is_refused_all_the_same(make_study) -> None:
    study = make_study()
    good = deltas_of(study)
    unused = next(name for name in sorted(good["Birch"]) if name.startswith("experts.2."))
    usage = [0.5, 0.5, 0.0]
    bad = {**good["Birch"], unused: np.full_like(good["Birch"][unused], -np.inf)}
    strategy = configured(study)
    ours = moved(strategy, [reply(1, good["Alder"], usage=usage), reply(2, bad, usage=usage)])
    assert [fault.number for fault in strategy.report.faults] == [504]
    assert [update.site for update in strategy.report.updates] == ["Alder"]
    assert all(np.isfinite(tensor).all() for tensor in ours.values())


def test_updates_that_all_hold_nan_move_nothing(make_study) -> None:
    study = make_study()
    bad = {name: np.full_like(tensor, np.nan) for name, tensor in deltas_of(study)["Alder"].items()}
    strategy = configured(study)
    assert strategy.aggregate_train(1, [reply(1, bad)]) == (None, None)
    assert [fault.number for fault in strategy.report.faults] == [504]
    assert strategy.report.updates == []


def test_updates_added_one_by_one_move_the_model_as_those_added_at_once(make_study, monkeypatch: pytest.MonkeyPatch) -> None:
    study = make_study()
    replies = [reply(node, deltas_of(study)[site]) for node, site in SITES.items()]
    at_once = moved(configured(study), replies)
    monkeypatch.setattr("fl_server.router_aware.AT_ONCE", 1)
    one_by_one = moved(configured(study), replies)
    assert all(np.array_equal(one_by_one[name], at_once[name]) for name in at_once)


def test_rounds_that_share_their_memory_share_nothing_else(make_study) -> None:
    """The second round begins at the first one's result, or at another study's tensors of the same shapes or of others."""
    study = make_study()
    strategy, first = configured(study), deltas_of(study, seed=1)
    one = strategy.aggregate_train(1, [reply(node, first[site]) for node, site in SITES.items()])[0]
    kept = {name: array.numpy().copy() for name, array in one.items()}
    for start in (one, record_of({name: tensor + 1 for name, tensor in kept.items()})):
        second, fresh = deltas_of(study, seed=2), RouterAware(study, SITES, SIZES)
        replies = [reply(node, second[site]) for node, site in SITES.items()]
        found = []
        for each in (strategy, fresh):
            each.configure_train(2, start, ConfigRecord(), grid=None)
            found.append(moved(each, replies))
        assert all(np.array_equal(found[0][name], found[1][name]) for name in found[1])
        assert all(np.array_equal(one[name].numpy(), kept[name]) for name in kept)

"""Robust rules per expert: beside their definitions, and against a site that flips its labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from test_rounds import ROSTER, Wire
from test_rounds import honest as answer_of_rounds

from fl_server.app import make_strategy, start_state
from fl_server.replies import Update
from fl_server.robust import robust_mean, rule_of
from fl_server.roster import Roster
from fl_server.round_strategy import unheard
from fl_server.rounds import run_rounds
from icmoe.errors import IcmoeError
from icmoe.features import Features
from icmoe.kinds import BALANCE_BIAS, expert_of, is_usage_weighted
from icmoe.messages import ARRAYS, NUMBERS, UPDATE
from icmoe.model import build_model
from icmoe.study import Study

RULES = ("trimmed-mean", "median", "multi-krum", "bulyan")


def robust_study(make_study, rule: str, quorum: int = 7, **changes: Any) -> Study:
    return make_study(quorum=quorum, aggregation={"robust": rule}, **changes)


def updates_of(study: Study, usages: list[list[float]], seed: int = 0) -> list[Update]:
    rng = np.random.default_rng(seed)
    shapes = {name: tensor.shape for name, tensor in start_state(study).arrays.items() if name != BALANCE_BIAS}
    return [
        Update(
            site=f"s{number}",
            size=10 * (number + 1),
            usage_M=tuple(usage),
            loss=0.5,
            steps=1,
            train_s=0.1,
            size_bytes=1,
            tensors={name: (1.0 + rng.normal(0, 0.1, shape)).astype(np.float32) for name, shape in shapes.items()},
        )
        for number, usage in enumerate(usages)
    ]


def poisoned(update: Update, factor: float) -> Update:
    return Update(
        **{
            **{slot: getattr(update, slot) for slot in update.__slots__},
            "tensors": {name: np.float32(factor) * tensor for name, tensor in update.tensors.items()},
        }
    )


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("factor", [-100.0, 1e6])
def test_one_malicious_site_cannot_leave_the_range_of_the_honest_ones(rule: str, factor: float, make_study) -> None:
    study = robust_study(make_study, rule)
    honest = updates_of(study, [[0.4, 0.3, 0.3]] * 7)
    found = robust_mean([poisoned(honest[0], factor), *honest[1:]], study)
    for name, tensor in found.items():
        others = np.stack([update.tensors[name] for update in honest[1:]])
        assert (tensor >= others.min(axis=0) - 1e-5).all(), name
        assert (tensor <= others.max(axis=0) + 1e-5).all(), name


def test_median_and_trimmed_mean_are_what_their_names_say(make_study) -> None:
    updates = updates_of(robust_study(make_study, "median"), [[0.4, 0.3, 0.3]] * 7)
    name = min(updates[0].tensors)
    stack = np.sort(np.stack([update.tensors[name] for update in updates]), axis=0)
    median = robust_mean(updates, robust_study(make_study, "median"))
    np.testing.assert_allclose(median[name], stack[3], rtol=1e-6)
    trimmed = robust_mean(updates, robust_study(make_study, "trimmed-mean"))
    np.testing.assert_allclose(trimmed[name], stack[1:-1].mean(axis=0), rtol=1e-5)


def test_an_expert_is_combined_from_the_sites_that_used_it(make_study) -> None:
    study = robust_study(make_study, "median", quorum=5)
    usages = [[0.5, 0.5, 0.0]] * 2 + [[0.4, 0.3, 0.3]] * 3
    updates = updates_of(study, usages)
    found = robust_mean(updates, study)
    last = [name for name in found if is_usage_weighted(name, study.model) and expert_of(name) == 2]
    assert last
    for name in last:
        used = np.stack([update.tensors[name] for update in updates[2:]])
        np.testing.assert_allclose(found[name], np.median(used, axis=0), rtol=1e-6)
    # Two that use it are too few to bear one that lies: then all sites count.
    few = updates_of(study, [[0.5, 0.5, 0.0]] * 3 + [[0.4, 0.3, 0.3]] * 2)
    name = last[0]
    everyone = np.median(np.stack([update.tensors[name] for update in few]), axis=0)
    np.testing.assert_allclose(robust_mean(few, study)[name], everyone, rtol=1e-6)


def test_as_many_sites_are_cut_at_either_end_as_may_be_malicious(make_study) -> None:
    for bad in (1, 2, 3):
        settings = make_study(quorum=2 * bad + 1, aggregation={"robust": "trimmed-mean", "malicious_sites": bad}).aggregation
        cut = {int(rule_of(settings, sites).beta * sites) for sites in range(settings.least_sites, 200)}
        assert cut == {bad}  # 1 / 49 of 49 is a little less than 1


def test_multi_krum_weighs_what_it_selects_by_size_and_use(make_study) -> None:
    study = robust_study(make_study, "multi-krum")
    usages = [[0.2 + 0.05 * number, 0.4 - 0.05 * number, 0.4] for number in range(7)]
    liar, *honest = updates_of(study, usages)
    found = robust_mean([poisoned(liar, 1e6), *honest], study)
    for name, tensor in found.items():
        expert = expert_of(name) if is_usage_weighted(name, study.model) else None
        weights = [one.size * (1.0 if expert is None else one.usage_M[expert]) for one in honest]
        wanted = np.average([one.tensors[name] for one in honest], axis=0, weights=weights)
        np.testing.assert_allclose(tensor, wanted, rtol=1e-4)


def test_multi_krum_combines_an_expert_that_nobody_used(make_study) -> None:
    study = robust_study(make_study, "multi-krum")
    honest = updates_of(study, [[0.5, 0.5, 0.0]] * 7)
    for name, tensor in robust_mean(honest, study).items():
        others = np.stack([update.tensors[name] for update in honest])
        assert (tensor >= others.min(axis=0) - 1e-5).all(), name
        assert (tensor <= others.max(axis=0) + 1e-5).all(), name


@pytest.mark.parametrize("rule", RULES)
def test_an_expert_that_too_few_sites_used_for_the_rule_is_combined_from_all(rule: str, make_study) -> None:
    by_size = {"robust": rule, "usage_exponent": 0.0, "min_contributors": 1}
    study = make_study(quorum=7, aggregation=by_size)
    enough = study.aggregation.least_sites

    def combined(users: int) -> np.ndarray:
        updates = updates_of(study, [[0.4, 0.3, 0.3]] * users + [[0.5, 0.5, 0.0]] * (8 - users))
        found = robust_mean(updates, study)
        return found[min(name for name in found if is_usage_weighted(name, study.model) and expert_of(name) == 2)]

    everyone = combined(8)
    assert np.array_equal(combined(enough - 1), everyone)
    assert not np.array_equal(combined(enough), everyone)


@pytest.mark.parametrize(("rule", "needed"), [("trimmed-mean", 3), ("median", 3), ("multi-krum", 5), ("bulyan", 7)])
def test_a_rule_without_its_sites_is_refused_before_anything_runs(rule: str, needed: int, make_study) -> None:
    robust_study(make_study, rule, quorum=needed)
    with pytest.raises(IcmoeError, match=f"needs a quorum of {needed}") as caught:
        robust_study(make_study, rule, quorum=needed - 1)
    assert caught.value.faults[0].value == "", "two keys do not fit: the whole file is no value to show"


def test_fewer_updates_than_the_rule_bears_move_nothing(make_study) -> None:
    study = robust_study(make_study, "median", quorum=3)
    strategy, wire = make_strategy(study, ROSTER).inner, Wire(answer_of_rounds)
    arrays = ArrayRecord({name: Array(tensor) for name, tensor in start_state(study).arrays.items()})
    replies = list(wire.pull_messages(wire.push_messages(strategy.configure_train(1, arrays, ConfigRecord(), grid=None))))
    assert strategy.aggregate_train(1, replies[:2]) == (None, None)
    assert strategy.aggregate_train(1, replies)[0] is not None


FIVE = {node: f"site{node}" for node in range(1, 6)}


class Hospitals:
    """Sites, five at first, that really train the tiny model on features with a pattern; the last may flip its labels."""

    def __init__(self, study: Study, make_features, *, flips: bool, sites: dict[int, str] = FIVE) -> None:
        self.study, self.last, self.flips = study, sites[max(sites)], flips
        self.data = {name: make_features(study, batch=6, seed=node) for node, name in sites.items()}
        self.test = make_features(study, batch=16, seed=99)

    def __call__(self, message: Message, site: str) -> Message:
        if message.metadata.message_type != "train":
            return Message(RecordDict({NUMBERS: MetricRecord({"val-dice": 0.0, "val-patients": 0})}), reply_to=message)
        features, target = self.data[site]
        if self.flips and site == self.last:
            target = target.flip(1)
        start = {name: torch.from_numpy(array.numpy().copy()) for name, array in message.content[ARRAYS].items()}
        model = build_model(self.study, seed=0)
        model.load_state_dict(start)
        usage_M = self.trained(model, features, target)
        delta = {name: (value.detach() - start[name]).numpy() for name, value in model.named_parameters()}
        numbers = {"slices": 10, "usage": usage_M, "loss": 0.5, "steps": 20, "seconds": 0.1}
        arrays = ArrayRecord({name: Array(tensor) for name, tensor in delta.items()})
        return Message(RecordDict({UPDATE: arrays, NUMBERS: MetricRecord(numbers)}), reply_to=message)

    def trained(self, model, features: Features, target: torch.Tensor) -> list[float]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        torch.manual_seed(0)
        for _ in range(15):
            optimizer.zero_grad()
            logits = model(features).logits_BKhw
            (torch.nn.functional.cross_entropy(logits, target)).backward()
            optimizer.step()
        return [1.0 / self.study.model.experts] * self.study.model.experts

    def dice(self, arrays: dict[str, np.ndarray]) -> float:
        model = build_model(self.study, seed=0)
        model.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in arrays.items()})
        features, target = self.test
        with torch.no_grad():
            found = model.eval()(features).logits_BKhw.argmax(1) == 1
        truth = target.argmax(1) == 1
        return float(2 * (found & truth).sum() / (found.sum() + truth.sum()))


def five(study: Study, hospitals: Hospitals) -> float:
    roster = Roster(FIVE, dict.fromkeys(FIVE.values(), 10))
    wire = Wire(hospitals, sites=FIVE)
    strategy = make_strategy(study, roster)
    state = run_rounds(wire, strategy, study, start_state(study), sites=FIVE, commit=unheard, poll_s=0.001)
    assert all(len(row["sites"]) == 5 for row in state.history)
    return hospitals.dice(state.arrays)


def test_one_of_five_that_flips_its_labels_costs_less_than_five_points(make_study, make_features) -> None:
    found = {}
    for rule in ("none", "trimmed-mean", "median", "multi-krum"):
        study = make_study(rounds=4, quorum=5, aggregation={"robust": rule})
        clean = five(study, Hospitals(study, make_features, flips=False))
        found[rule] = (clean, clean - five(study, Hospitals(study, make_features, flips=True)))
    print({rule: (round(clean, 4), round(lost, 4)) for rule, (clean, lost) in found.items()})
    assert all(clean > 0.5 for clean, _ in found.values())
    assert found["none"][1] > max(lost for rule, (_, lost) in found.items() if rule != "none")
    assert all(lost < 0.05 for rule, (_, lost) in found.items() if rule != "none")

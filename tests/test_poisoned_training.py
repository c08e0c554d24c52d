"""Twelve poisoned updates in a study that really trains: what the honest sites reach together is reached all the same."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from test_guard import POISONS, changed
from test_robust import FIVE, Hospitals
from test_rounds import Wire

from fl_server.app import make_strategy, start_state
from fl_server.roster import Roster
from fl_server.round_strategy import unheard
from fl_server.rounds import run_rounds
from fl_server.run_state import RunState
from icmoe.messages import ARRAYS, CONFIG, NUMBERS, ROUND_KEY, UPDATE
from icmoe.study import Study

ROUNDS = 4
BAD = FIVE[5]
KINDS = [kind for kind in POISONS if kind not in {"size far above announced", "a broken header", "an archive"}]
Answer = Callable[[Message, str], Message | None]


class Remembering:
    """The hospitals of `test_robust`, each of which trains once from the same global model: the same bits come out again."""

    def __init__(self, hospitals: Hospitals) -> None:
        self.hospitals, self._known = hospitals, dict[tuple[str, str], tuple[dict[str, np.ndarray], dict[str, object]]]()

    def __call__(self, message: Message, site: str) -> Message:
        if message.metadata.message_type != "train":
            return self.hospitals(message, site)
        start = b"".join(array.data for array in message.content[ARRAYS].values())
        key = site, hashlib.sha256(start).hexdigest()
        if key not in self._known:
            content = self.hospitals(message, site).content
            self._known[key] = {name: one.numpy() for name, one in content[UPDATE].items()}, dict(content[NUMBERS])
        tensors, numbers = self._known[key]
        arrays = ArrayRecord({name: Array(tensor) for name, tensor in tensors.items()})
        return Message(RecordDict({UPDATE: arrays, NUMBERS: MetricRecord(numbers)}), reply_to=message)


def run(study: Study, answer: Answer, sites: dict[int, str] = FIVE) -> RunState:
    strategy = make_strategy(study, Roster(FIVE, dict.fromkeys(FIVE.values(), 10)))
    wire = Wire(answer, sites=sites)
    return run_rounds(wire, strategy, study, start_state(study), sites=sites, commit=unheard, poll_s=0.001)


def poisoned(honest: Answer, kind: str) -> Answer:
    """Return the hospitals of which the last poisons each of its updates; a replay begins with the second one."""
    first: dict[str, Array] = {}

    def answer(message: Message, site: str) -> Message | None:
        reply = honest(message, site)
        if site != BAD or message.metadata.message_type != "train":
            return reply
        if kind != "replay":
            return changed(reply, kind)
        first.update({} if first else dict(reply.content[UPDATE]))
        reply.content[UPDATE] = ArrayRecord(first)
        return reply

    return answer


def only_first(honest: Answer) -> Answer:
    return lambda message, site: None if site == BAD and message.content[CONFIG][ROUND_KEY] > 1 else honest(message, site)


def same_bits(one: RunState, other: RunState) -> bool:
    return all(np.array_equal(one.arrays[name], tensor) for name, tensor in other.arrays.items())


def test_twelve_poisoned_updates_cost_nothing_but_the_site_that_sends_them(make_study, make_features) -> None:
    study = make_study(rounds=ROUNDS, quorum=4, deadline_s=0.5)
    honest = Remembering(Hospitals(study, make_features, flips=False))
    clean = honest.hospitals.dice(run(study, honest).arrays)
    others = {node: name for node, name in FIVE.items() if name != BAD}
    without, replaced = run(study, honest, others), run(study, only_first(honest))
    assert clean > 0.5
    lost = {}
    for kind in (*KINDS, "replay"):
        state = run(study, poisoned(honest, kind))
        assert same_bits(state, replaced if kind == "replay" else without), kind
        assert {fault["where"] for row in state.history[kind == "replay" :] for fault in row["faults"]} == {BAD}
        lost[kind] = clean - honest.hospitals.dice(state.arrays)
    print(f"clean {clean:.4f}, lost by " + ", ".join(f"{kind} {points:+.4f}" for kind, points in lost.items()))
    assert len(lost) == 12
    assert all(points < 0.01 for points in lost.values())


@pytest.mark.parametrize("rule", ["trimmed-mean", "median", "multi-krum", "bulyan"])
def test_one_of_seven_that_flips_its_labels_costs_less_than_five_points(rule: str, make_study, make_features) -> None:
    """Bulyan bears one of seven and no fewer; the others bear one of five, which `test_robust` shows."""
    study = make_study(rounds=ROUNDS, quorum=7, aggregation={"robust": rule})
    seven = {node: f"site{node}" for node in range(1, 8)}
    found = []
    for flips in (False, True):
        hospitals = Hospitals(study, make_features, flips=flips, sites=seven)
        strategy = make_strategy(study, Roster(seven, dict.fromkeys(seven.values(), 10)))
        wire = Wire(hospitals, sites=seven)
        state = run_rounds(wire, strategy, study, start_state(study), sites=seven, commit=unheard, poll_s=0.001)
        found.append(hospitals.dice(state.arrays))
    print(f"{rule}: clean {found[0]:.4f}, lost {found[0] - found[1]:+.4f}")
    assert found[0] > 0.5
    assert found[0] - found[1] < 0.05

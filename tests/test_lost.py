"""A message that a restarted site lost is sent again, so that a round waits for the site and not for its deadline."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from test_rounds import SITES, Wire, honest, run

from fl_server.exchanging import ask
from fl_server.roster import meet
from icmoe.messages import ARRAYS, CONFIG, ROUND_KEY


@pytest.fixture(autouse=True)
def _looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fl_server.exchanging.LOOK_S", 0.02)


class Restarting(Wire):
    """A wire on which one site loses what it was sent first, and connects anew a moment later."""

    def __init__(self, node: int, kind: str = "train") -> None:
        super().__init__(self.losing)
        self.node, self.kind, self.lost = node, kind, list[Message]()

    def losing(self, message: Message, site: str) -> Message | None:
        if message.metadata.dst_node_id == self.node and message.metadata.message_type == self.kind and not self.lost:
            self.lost.append(message)
            return None
        return honest(message, site)

    def get_nodes(self) -> list[NodeInfo]:
        now = datetime.now(UTC).isoformat()
        return [
            NodeInfo(node_id=node, name=name, status="online", last_activated_at=now if self.lost and node == self.node else "")
            for node, name in SITES.items()
        ]


def test_a_round_waits_for_a_restarted_site_and_ends_with_the_same_bits(make_study, tmp_path: Path) -> None:
    study, began = make_study(rounds=2, quorum=3, deadline_s=60.0), time.monotonic()
    wire = Restarting(12)
    state, calm = run(study, tmp_path / "a", wire=wire), run(study, tmp_path / "b")
    assert time.monotonic() - began < 20
    assert all(np.array_equal(state.arrays[name], tensor) for name, tensor in calm.arrays.items())
    assert [(row["attempts"], row["faults"]) for row in state.history] == [(1, []), (1, [])]
    rounds = [m.content[CONFIG][ROUND_KEY] for m in wire.asked if m.metadata.message_type == "train"]
    assert (rounds.count(1), rounds.count(2)) == (4, 3)


def message(kind: str) -> Message:
    arrays = ArrayRecord({"a": Array(np.zeros(3, np.float32))})
    content = RecordDict({ARRAYS: arrays, CONFIG: ConfigRecord({ROUND_KEY: 1})})
    return Message(content, dst_node_id=12, message_type=kind)


def test_a_site_that_lost_the_question_who_it_is_takes_part_all_the_same(make_study) -> None:
    study, began = make_study(quorum=3, deadline_s=60.0), time.monotonic()
    assert sorted(meet(Restarting(12, "query.site"), 3, study, poll_s=0.01).sizes) == sorted(SITES.values())
    assert time.monotonic() - began < 20


def test_a_score_is_not_asked_for_twice_since_a_noised_one_is_paid_for() -> None:
    wire = Restarting(12, "evaluate")
    assert ask(wire, [message("evaluate")], deadline_s=0.3, poll_s=0.01) == []
    assert len(wire.asked) == 1


def test_a_site_that_only_takes_long_is_not_asked_twice() -> None:
    wire = Wire(lambda *_: None)
    assert ask(wire, [message("train")], deadline_s=0.3, poll_s=0.01) == []
    before = datetime.fromtimestamp(time.time() - 60, UTC).isoformat()
    wire.nodes = [NodeInfo(node_id=12, name="Birch", status="online", last_activated_at=before)]
    assert ask(wire, [message("train")], deadline_s=0.3, poll_s=0.01) == []
    assert len(wire.asked) == 2


@pytest.mark.parametrize("deadline_s", [60.0, 5 * 86400.0])
def test_flower_keeps_a_question_as_long_as_the_deadline_and_never_shorter_than_it_would(deadline_s: float) -> None:
    wire = Wire(honest)
    question = Message(RecordDict({CONFIG: ConfigRecord()}), dst_node_id=11, message_type="query.site")
    (reply,) = ask(wire, [question], deadline_s=deadline_s, poll_s=0.01)
    assert wire.asked[0].metadata.ttl > max(deadline_s, 43_000)
    assert reply.metadata.ttl > max(deadline_s, 43_000), "an answer is kept for what is left of it"


class Slow(Wire):
    """A wire whose only site connected last at these times, look by look, and answers after some looks more."""

    def __init__(self, *connected: str) -> None:
        super().__init__(lambda *_: None)
        self.connected, self.looks = connected, 0

    def get_nodes(self) -> list[NodeInfo]:
        at = self.connected[min(self.looks, len(self.connected) - 1)]
        self.looks += 1
        if self.looks == len(self.connected) + 4:
            self.deliver(self.asked[-1], honest)
        return [NodeInfo(node_id=12, name="Birch", status="online", last_activated_at=at)]


def test_a_clock_that_was_set_back_does_not_lose_a_message_with_each_look() -> None:
    ahead, now = (datetime.fromtimestamp(time.time() + seconds, UTC).isoformat() for seconds in (3600, -60))
    for connected, asked in (((ahead,), 2), ((ahead, now), 3)):  # restarted after the clock was set back
        wire = Slow(*connected)
        assert len(ask(wire, [message("train")], deadline_s=60.0, poll_s=0.01)) == 1
        assert len(wire.asked) == asked

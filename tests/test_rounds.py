"""The rounds of a study: commit and resume, deadlines, failing sites; only the wire is a fake."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from pkgutil import resolve_name

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.proto.node_pb2 import NodeInfo

from fl_server.app import make_strategy, start_state
from fl_server.exchanging import ask
from fl_server.roster import Roster, meet
from fl_server.rounds import run_rounds
from fl_server.router_aware import RouterAware
from fl_server.run_state import RunState, latest_state
from fl_server.server_optimizer import ServerOptimized
from icmoe.errors import IcmoeError
from icmoe.kinds import BALANCE_BIAS
from icmoe.messages import ARRAYS, CONFIG, NUMBERS, ROUND_KEY, UPDATE
from icmoe.packing import unpack_records
from icmoe.strategies import SERVER_OPTIMIZERS
from icmoe.study import Study

SITES = {11: "Alder", 12: "Birch", 13: "Cedar"}
ROSTER = Roster(SITES, {"Alder": 30, "Birch": 20, "Cedar": 10})

Answer = Callable[[Message, str], Message | None]


def registered(node: int, name: str, status: str = "online") -> NodeInfo:
    return NodeInfo(node_id=node, name=name, status=status)


class Wire:
    """Flower's Grid with sites that answer at once; an answer of None is a site that is silent."""

    def __init__(self, answer: Answer, nodes: Iterable[NodeInfo] | None = None, sites: Mapping[int, str] = SITES) -> None:
        self.answer, self.sites = answer, sites
        self.nodes = [registered(node, name) for node, name in sites.items()] if nodes is None else list(nodes)
        self.asked: list[Message] = []
        self._replies: dict[str, Message] = {}

    def get_nodes(self) -> Iterable[NodeInfo]:
        return self.nodes

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"m{len(self.asked)}"
            self.asked.append(message)
            unpack_records(message.content)  # as a site does
            ids.append(message.metadata.message_id)
            self.deliver(message, self.answer)
        return ids

    def deliver(self, message: Message, answer: Answer) -> None:
        reply = answer(message, self.sites[message.metadata.dst_node_id])
        if reply is not None:
            reply.metadata.__dict__["_reply_to_message_id"] = message.metadata.message_id
            reply.metadata.__dict__["_src_node_id"] = message.metadata.dst_node_id
            self._replies[message.metadata.message_id] = reply

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(number) for number in list(message_ids) if number in self._replies]


def honest(message: Message, site: str) -> Message:
    """Answer with an update that depends on site, round and the global model, so that every bit matters."""
    if message.metadata.message_type == "query.site":
        about = ConfigRecord({"site": site, "slices": ROSTER.sizes[site]})
        return Message(RecordDict({CONFIG: about}), reply_to=message)
    numbers = {"val-dice": 0.1 * message.content[CONFIG][ROUND_KEY], "val-patients": 2}
    if message.metadata.message_type == "evaluate":
        return Message(RecordDict({NUMBERS: MetricRecord({**numbers, "val-dice": 0.9})}), reply_to=message)
    rng = np.random.default_rng([len(site), ord(site[0]), message.content[CONFIG][ROUND_KEY]])
    update = {
        name: Array((0.1 * array.numpy() + rng.normal(0, 0.01, array.numpy().shape)).astype(np.float32))
        for name, array in message.content[ARRAYS].items()
        if name != BALANCE_BIAS
    }
    usage = rng.dirichlet(np.ones(3)).tolist()
    numbers |= {"slices": ROSTER.sizes[site], "usage": usage, "loss": 0.5, "steps": 3, "seconds": 0.1}
    return Message(RecordDict({UPDATE: ArrayRecord(update), NUMBERS: MetricRecord(numbers)}), reply_to=message)


def run(
    study: Study,
    path: Path,
    answer: Answer = honest,
    stop_after: int | None = None,
    *,
    wire: Wire | None = None,
    keep: int = 0,
    tell: Callable[[str], object] = lambda line: None,
) -> RunState:
    state = latest_state(path, study) or start_state(study)
    strategy = make_strategy(study, ROSTER)

    def on_round(record: dict) -> None:
        if record["round"] == stop_after:
            raise KeyboardInterrupt

    def commit(now: RunState) -> None:
        now.commit(path, keep=keep)

    grid = wire or Wire(answer)
    return run_rounds(grid, strategy, study, state, sites=SITES, commit=commit, poll_s=0.01, on_round=on_round, tell=tell)


@pytest.mark.parametrize("optimizer", ["none", "adam", "yogi"])
@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_a_stopped_study_ends_with_the_same_bytes(optimizer: str, stop_after: int, make_study, tmp_path: Path) -> None:
    study = make_study(rounds=4, aggregation={"optimizer": optimizer})
    undisturbed = run(study, tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        run(study, tmp_path / "b", stop_after=stop_after)
    resumed = run(study, tmp_path / "b")
    assert resumed.round == 4
    assert all(np.array_equal(resumed.arrays[name], tensor) for name, tensor in undisturbed.arrays.items())
    assert [row["sites"]["Alder"]["usage"] for row in resumed.history] == [
        row["sites"]["Alder"]["usage"] for row in undisturbed.history
    ]


def test_the_validation_score_of_a_round_is_that_of_its_model(make_study, tmp_path: Path) -> None:
    state = run(make_study(rounds=3), tmp_path / "s")
    # Round r + 1 scores what round r left behind, and the closing evaluation the last one.
    assert [row["val_dice"] for row in state.history] == pytest.approx([0.2, 0.3, 0.9])
    assert state.history[0]["sites"]["Birch"]["val_dice"] == pytest.approx(0.2)
    assert state.closed


def test_a_score_that_is_none_is_not_entered(make_study, tmp_path: Path) -> None:
    def answer(message: Message, site: str) -> Message | None:
        reply = honest(message, site)
        if site == "Cedar" and NUMBERS in reply.content:
            reply.content[NUMBERS]["val-dice"] = 7.0
        return reply

    state = run(make_study(rounds=1), tmp_path / "s", answer)
    assert (state.history[0]["val_dice"], state.history[0]["sites"]["Cedar"]["val_dice"]) == (pytest.approx(0.9), None)


def test_a_finished_study_asks_nobody_again(make_study, tmp_path: Path) -> None:
    study = make_study()
    run(study, tmp_path / "s")
    again = run(study, tmp_path / "s", answer=lambda message, site: pytest.fail(f"{site} was asked"))
    assert again.round == study.rounds


def test_the_round_goes_on_without_a_site_that_fails_or_is_silent(make_study, tmp_path: Path) -> None:
    def answer(message: Message, site: str) -> Message | None:
        if site == "Birch":
            return Message(Error(1304, "ICM304 site did not finish its part of a round"), reply_to=message)
        return None if site == "Cedar" else honest(message, site)

    began = time.monotonic()
    state = run(make_study(rounds=1, deadline_s=0.3), tmp_path / "s", answer)
    assert time.monotonic() - began < 5
    record = state.history[0]
    assert set(record["sites"]) == {"Alder"}
    assert [(fault["where"], fault["number"]) for fault in record["faults"]] == [("Birch", 304), ("Cedar", 304)]
    assert "before the deadline" in record["faults"][1]["sentence"]


def test_without_any_update_the_study_stops_and_what_was_committed_stays(make_study, tmp_path: Path) -> None:
    study = make_study(rounds=3, deadline_s=0.2)

    def answer(message: Message, site: str) -> Message | None:
        return honest(message, site) if message.content[CONFIG][ROUND_KEY] == 1 else None

    with pytest.raises(IcmoeError) as caught:
        run(study, tmp_path / "s", answer)
    assert caught.value.faults[0].number == 501
    assert RunState.load(tmp_path / "s", study).round == 1


def test_below_the_quorum_the_round_is_tried_again_and_then_the_run_stops_unmoved(make_study, tmp_path: Path) -> None:
    study, asked, said = make_study(rounds=2, quorum=2, retries=2, deadline_s=0.2), list[tuple[str, int]](), list[str]()

    def answer(message: Message, site: str) -> Message | None:
        asked.append((site, message.content[CONFIG][ROUND_KEY]))
        return honest(message, site) if site == "Alder" or message.content[CONFIG][ROUND_KEY] == 1 else None

    with pytest.raises(IcmoeError) as caught:
        run(study, tmp_path / "s", answer, tell=said.append)
    assert (caught.value.faults[0].number, caught.value.faults[0].value) == (515, "1 usable")
    assert RunState.load(tmp_path / "s", study).round == 1
    # The site whose update is usable is asked once, the silent ones each time.
    second = [site for site, number in asked if number == 2]
    assert (second.count("Alder"), second.count("Birch"), second.count("Cedar")) == (1, 3, 3)
    assert sum("2 are needed; the model did not move" in line for line in said) == 3
    assert any("round 2 of 2, attempt 3 of 3: waiting for Birch, Cedar until" in line for line in said)


def test_a_round_that_reaches_its_quorum_late_equals_one_that_did_at_once(make_study, tmp_path: Path) -> None:
    study, tries = make_study(rounds=2, quorum=3, deadline_s=0.2), list[int]()

    def answer(message: Message, site: str) -> Message | None:
        if site == "Birch" and message.content[CONFIG].get(ROUND_KEY) == 1:
            tries.append(1)
            if len(tries) < 3:
                return Message(Error(1304, "ICM304 ?"), reply_to=message)
        return honest(message, site)

    late, calm = run(study, tmp_path / "a", answer), run(study, tmp_path / "b")
    assert all(np.array_equal(late.arrays[name], tensor) for name, tensor in calm.arrays.items())
    assert [row["attempts"] for row in late.history] == [3, 1]


def test_a_straggler_is_cut_its_late_update_refused_and_the_next_round_asks_it(make_study, tmp_path: Path) -> None:
    study = make_study(rounds=3, quorum=2, deadline_s=0.3)
    held: list[tuple[Wire, Message, str]] = []

    def answer(message: Message, site: str) -> Message | None:
        if site == "Cedar" and message.content[CONFIG].get(ROUND_KEY) == 1:
            held.append(message)
            return None
        if site == "Cedar" and message.content[CONFIG].get(ROUND_KEY) == 2 and held:
            wire.deliver(held.pop(), honest)  # what round 1 waited for in vain
        return honest(message, site)

    wire = Wire(answer)
    state = run(study, tmp_path / "s", wire=wire)
    assert [sorted(row["sites"]) for row in state.history] == [["Alder", "Birch"], list(SITES.values()), list(SITES.values())]
    assert [[(fault["number"], fault["where"]) for fault in row["faults"]] for row in state.history] == [
        [(304, "Cedar")],
        [(513, "Cedar")],
        [],
    ]
    undisturbed = run(
        study, tmp_path / "b", lambda message, site: None if _is(message, site, 1, "Cedar") else honest(message, site)
    )
    assert all(np.array_equal(state.arrays[name], tensor) for name, tensor in undisturbed.arrays.items())


@pytest.mark.parametrize("comes", ["train", "evaluate"])
def test_a_late_answer_scores_no_later_model(comes: str, make_study, tmp_path: Path) -> None:
    """Round 1's answer scores the start; coming in round 2, or at the end, it says nothing of what round 1 left behind."""
    held = list[Message]()

    def answer(message: Message, site: str) -> Message | None:
        if site != "Cedar":
            return honest(message, site)
        if _is(message, site, 1, "Cedar") and message.metadata.message_type == "train":
            held.append(message)
        elif message.metadata.message_type == comes and held:
            wire.deliver(held.pop(), honest)
        return None

    wire = Wire(answer)
    state = run(make_study(rounds=2, quorum=2, deadline_s=0.3), tmp_path / "s", wire=wire)
    assert [row["val_dice"] for row in state.history] == pytest.approx([0.2, 0.9])


def _is(message: Message, site: str, number: int, name: str) -> bool:
    return site == name and message.content[CONFIG].get(ROUND_KEY) == number


def test_the_last_commits_are_kept_and_one_stands_in_for_a_damaged_newest(make_study, tmp_path: Path, capsys) -> None:
    study, path = make_study(rounds=6), tmp_path / "study.state.safetensors"
    state = run(study, path, keep=3)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "study.state.00004.safetensors",
        "study.state.00005.safetensors",
        "study.state.00006.safetensors",
        "study.state.rounds.jsonl",
        path.name,
    ]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # one bit of the last tensor: the file can be read, its digest tells
    path.unlink()
    path.write_bytes(content)
    with pytest.raises(IcmoeError, match="ICM502"):
        RunState.load(path, study)
    (tmp_path / "study.state.00006.safetensors").write_bytes(content)
    assert latest_state(path, study).round == 5
    assert "ICM517" in capsys.readouterr().err
    again = run(study, path, keep=3)
    assert all(np.array_equal(again.arrays[name], tensor) for name, tensor in state.arrays.items())


def test_bytes_are_those_of_the_tensors_as_sent(make_study, tmp_path: Path) -> None:
    state = run(make_study(rounds=1), tmp_path / "s")
    row = state.history[0]["sites"]["Alder"]
    values = sum(tensor.nbytes for name, tensor in state.arrays.items() if name != BALANCE_BIAS)
    assert values < row["bytes_up"] < 1.5 * values + 200 * len(state.arrays)
    assert state.history[0]["bytes_up"] == 3 * row["bytes_up"]


def test_a_state_round_trips_with_the_optimisers_moments(make_study, tmp_path: Path) -> None:
    study = make_study(rounds=2, aggregation={"optimizer": "adam"})
    state = run(study, tmp_path / "s")
    loaded = RunState.load(tmp_path / "s", study)
    assert loaded.history == state.history
    assert loaded.extra.keys() == state.extra.keys() != set()
    assert isinstance(make_strategy(study, ROSTER).inner, ServerOptimized)


def test_a_site_is_the_name_registered_with_its_key(make_study, capsys: pytest.CaptureFixture[str]) -> None:
    study = make_study(deadline_s=0.5)
    assert meet(Wire(honest), 3, study, poll_s=0.01) == ROSTER

    def impostor(message: Message, site: str) -> Message:
        return honest(message, "Alder")

    found = meet(Wire(impostor), 1, study, poll_s=0.01)
    assert found == Roster({11: "Alder"}, {"Alder": 30})
    said = capsys.readouterr().err
    assert "ICM331 Birch" in said
    assert "ICM331 Cedar" in said
    with pytest.raises(IcmoeError) as caught:
        meet(Wire(impostor), 2, study, poll_s=0.01)
    assert [(fault.number, fault.where) for fault in caught.value.faults] == [(331, "Birch"), (331, "Cedar"), (501, "")]


def test_only_a_simulation_believes_what_a_node_says_of_itself(make_study) -> None:
    study = make_study(deadline_s=0.5)
    nameless = [registered(node, "") for node in SITES]
    assert meet(Wire(honest, nameless), 3, study, trust_answers=True, poll_s=0.01) == ROSTER
    with pytest.raises(IcmoeError) as caught:
        meet(Wire(honest, nameless), 1, study, poll_s=0.01)
    assert [fault.number for fault in caught.value.faults] == [331, 331, 331, 501]
    with pytest.raises(IcmoeError) as caught:
        meet(Wire(lambda message, site: honest(message, "Alder"), nameless), 3, study, trust_answers=True, poll_s=0.01)
    assert [fault.number for fault in caught.value.faults] == [301, 301, 501]


def test_a_site_that_fails_or_is_silent_does_not_keep_the_others_waiting(make_study, capsys: pytest.CaptureFixture[str]) -> None:
    def answer(message: Message, site: str) -> Message | None:
        if site == "Birch":
            return Message(Error(1302, "ICM302 study is not approved at this site"), reply_to=message)
        return None if site == "Cedar" else honest(message, site)

    assert set(meet(Wire(answer), 1, make_study(deadline_s=0.3), poll_s=0.01).sizes) == {"Alder"}
    said = capsys.readouterr().err
    assert "ICM302 Birch" in said
    assert "ICM332 Cedar" in said


def test_only_nodes_that_are_online_are_asked(make_study, tmp_path: Path) -> None:
    study = make_study(rounds=1, deadline_s=0.3)
    nodes = [registered(11, "Alder"), registered(12, "Birch", "offline"), registered(13, "Cedar")]
    wire = Wire(honest, nodes)
    assert set(meet(wire, 2, study, poll_s=0.01).sizes) == {"Alder", "Cedar"}
    with pytest.raises(IcmoeError, match="ICM501"):
        meet(wire, 3, study, poll_s=0.01)
    wire.asked.clear()
    state = run_rounds(
        wire, make_strategy(study, ROSTER), study, start_state(study), sites=SITES, commit=lambda now: None, poll_s=0.01
    )
    assert {message.metadata.dst_node_id for message in wire.asked} == {11, 13}
    assert [(fault["number"], fault["where"]) for fault in state.history[0]["faults"]] == [(332, "Birch")]
    assert set(state.history[0]["sites"]) == {"Alder", "Cedar"}


def test_a_late_reply_comes_back_but_is_not_told_as_one_of_the_round(make_study) -> None:
    wire, late, heard = Wire(lambda message, site: None), set[str](), list[str]()
    first, second = (
        Message(RecordDict({CONFIG: ConfigRecord({ROUND_KEY: 1})}), dst_node_id=11, message_type="evaluate") for _ in "ab"
    )

    def hear(reply: Message) -> None:
        heard.append(reply.metadata.reply_to_message_id)

    assert ask(wire, [first], deadline_s=0.05, poll_s=0.01, on_reply=hear, late=late) == []
    assert late == {"m0"}
    wire.deliver(first, honest)
    wire.answer = honest
    replies = ask(wire, [second], deadline_s=1.0, poll_s=0.01, on_reply=hear, late=late)
    assert {reply.metadata.reply_to_message_id for reply in replies} == {"m0", "m1"}
    assert (heard, late) == (["m1"], set())


def test_the_wait_ends_at_the_deadline(make_study) -> None:
    wire = Wire(lambda message, site: None)
    message = Message(RecordDict({CONFIG: ConfigRecord({})}), dst_node_id=11, message_type="train")
    began = time.monotonic()
    assert ask(wire, [copy.copy(message)], deadline_s=0.2, poll_s=0.02) == []
    assert 0.15 < time.monotonic() - began < 3


@pytest.mark.parametrize("name", SERVER_OPTIMIZERS)
def test_every_step_that_a_study_may_ask_of_the_server_is_taken_inside_the_guard(name: str, make_study):
    inner = make_strategy(make_study(aggregation={"optimizer": name}), ROSTER).inner
    assert isinstance(inner, resolve_name(SERVER_OPTIMIZERS[name]) if SERVER_OPTIMIZERS[name] else RouterAware)

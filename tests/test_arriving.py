"""Replies over the network, part by part: a bad, a false or a slow one concerns its own site and no other."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.common.serde_utils import metadata_to_proto
from flwr.proto.message_pb2 import Message as Sent
from superlink_parts import RUN, Parts, Superlink, part, parts, parts_of
from test_rounds import ROSTER, SITES, Wire, honest

from fl_server import app, arriving
from fl_server.app import make_strategy, start_state
from fl_server.arriving import Arriving, one_by_one
from fl_server.exchanging import ask
from fl_server.receipts import Receipted
from fl_server.roster import meet
from fl_server.rounds import run_rounds
from fl_server.run_state import RunState
from icmoe.messages import ARRAYS, CONFIG, NUMBERS, UPDATE
from icmoe.packing import unpack_records
from icmoe.study import Study


def told(message: Message, site: str) -> Message:
    unpack_records(message.content)  # as a site does
    return honest(message, site)


def about(question: Message) -> bytes:
    reply = Message(RecordDict(), reply_to=question)
    return Sent(metadata=metadata_to_proto(reply.metadata)).SerializeToString(deterministic=True)


def whole(question: Message, *inner: tuple[str, bytes]) -> Parts:
    """Return a message around a content that is the last of these objects."""
    return parts(*inner, part("Message", [inner[-1][0]], about(question)))


def with_array(question: Message, claims: object, *chunks: tuple[str, bytes], name: str = "a") -> Parts:
    array = part("Array", [number for number, _ in chunks], json.dumps(claims).encode())
    record = part("ArrayRecord", [array[0]], json.dumps({name: array[0]}).encode())
    content = part("RecordDict", [record[0]], json.dumps({UPDATE: record[0]}).encode())
    return whole(question, *chunks, array, record, content)


CHUNK = part("ArrayChunk", [], bytes(1000))
CLAIMS = {"dtype": "float32", "shape": [1], "stype": "numpy.ndarray", "arraychunk_ids": [0]}

BAD: dict[str, Callable[[Message], Parts]] = {
    "no JSON": lambda question: whole(question, part("RecordDict", [], b"\xff")),
    "JSON of another form": lambda question: whole(question, part("RecordDict", [], b"[1]")),
    "no message": lambda _: parts(part("RecordDict", [], b"{}")),
    "a child that is not there": lambda question: parts(part("Message", ["ab" * 32], about(question))),
    "no content and no error": lambda question: parts(part("Message", [], about(question))),
    "a content that is none": lambda question: whole(question, part("MetricRecord", [], b"")),
    "no protobuf": lambda _: parts(part("RecordDict", [], b"{}"), part("Message", [part("RecordDict", [], b"{}")[0]], b"\xff")),
    "a type that is no text": lambda question: with_array(question, {**CLAIMS, "dtype": {"a": 1}}, CHUNK),
    "a shape of texts": lambda question: with_array(question, {**CLAIMS, "shape": ["x"]}, CHUNK),
    "a name that no disk takes": lambda question: with_array(question, CLAIMS, CHUNK, name="\ud800"),
    "a piece named without end": lambda question: with_array(question, {**CLAIMS, "arraychunk_ids": [0] * 10**6}, CHUNK),
    "a piece that is not there": lambda question: with_array(question, {**CLAIMS, "arraychunk_ids": [5]}, CHUNK),
    "too many parts": lambda question: whole(question, *(part("ArrayChunk", [], b"%d" % n) for n in range(11_000))),
    "too many bytes": lambda question: whole(question, *(part("ArrayChunk", [], bytes(5_000_000) + b"%d" % n) for n in range(5))),
}


def with_cedar(bad: Callable[[Message], Parts | None], kind: str = "train") -> Superlink:
    """Return a SuperLink where Cedar answers so to questions of this kind, and everybody else as they should."""

    def answer(message: Message, site: str) -> Parts | None:
        if site == "Cedar" and message.metadata.message_type == kind:
            return bad(message)
        return parts_of(told(message, site))

    return Superlink(answer, SITES)


def run(study: Study, superlink: Superlink, folder: Path, notes: list[tuple[str, dict]] | None = None) -> RunState:
    note = (lambda event, values: notes.append((event, dict(values)))) if notes is not None else (lambda *_: None)
    grid, state = Receipted(one_by_one(superlink.grid()), SITES, folder), start_state(study)
    return run_rounds(
        grid, make_strategy(study, ROSTER, note=note), study, state, sites=SITES, commit=lambda _: None, poll_s=0.01
    )


@pytest.mark.parametrize("name", BAD)
def test_a_reply_that_is_none_is_refused_by_number_and_the_round_goes_on(name: str, make_study, tmp_path: Path, capsys) -> None:
    superlink, notes = with_cedar(BAD[name]), list[tuple[str, dict]]()
    state = run(make_study(rounds=1, quorum=2), superlink, tmp_path, notes)
    (fault,) = state.history[0]["faults"]
    assert (fault["number"], fault["where"], sorted(state.history[0]["sites"])) == (504, "Cedar", ["Alder", "Birch"])
    assert [(event, values["site"]) for event, values in notes] == [("refused", "Cedar")]
    assert "ICM504 Cedar: answer was refused, " in capsys.readouterr().err
    assert len(superlink.confirmed) == len(superlink.given) == 6


def test_a_site_of_bad_replies_sits_out_after_three_rounds_like_one_of_bad_updates(make_study, tmp_path: Path) -> None:
    state = run(make_study(rounds=4, quorum=2), with_cedar(BAD["no JSON"]), tmp_path)
    assert [[fault["number"] for fault in row["faults"]] for row in state.history] == [[504], [504], [504], [514]]


@pytest.mark.parametrize("name", BAD)
def test_an_introduction_that_is_no_message_keeps_only_its_site_out(name: str, make_study) -> None:
    study = make_study(deadline_s=5.0)
    assert set(meet(one_by_one(with_cedar(BAD[name], "query.site").grid()), 2, study, poll_s=0.01).sizes) == {"Alder", "Birch"}


def test_good_replies_come_through_as_they_were_sent(make_study, tmp_path: Path) -> None:
    study = make_study(rounds=2, quorum=3)
    calm = start_state(study)
    sent, strategy = with_cedar(lambda message: parts_of(told(message, "Cedar"))), make_strategy(study, ROSTER)
    run_rounds(Wire(honest), strategy, study, calm, sites=SITES, commit=lambda _: None, poll_s=0.01)
    state = run(study, sent, tmp_path)
    assert [row["faults"] for row in state.history] == [[], []]
    assert all(np.array_equal(state.arrays[name], tensor) for name, tensor in calm.arrays.items())


def test_an_error_of_a_site_stays_its_own(make_study, tmp_path: Path) -> None:
    broken = with_cedar(lambda message: parts_of(Message(Error(1302, "ICM302 and more"), reply_to=message)))
    state = run(make_study(rounds=1, quorum=2), broken, tmp_path)
    assert [(fault["number"], fault["where"]) for fault in state.history[0]["faults"]] == [(302, "Cedar")]


def test_a_site_cannot_answer_in_the_name_of_another(make_study, tmp_path: Path) -> None:
    """Flower's Grid believes what stands in the message; the SuperLink knows whose key signed it."""
    asked = dict[str, Message]()

    def answer(message: Message, site: str) -> Parts | None:
        asked[site] = message
        reply = told(message, site)
        if site == "Cedar" and message.metadata.message_type == "train":
            if "Alder" not in asked:
                return None
            other = asked["Alder"].metadata
            reply.metadata.__dict__["_src_node_id"] = other.dst_node_id
            reply.metadata.__dict__["_reply_to_message_id"] = other.message_id
        return parts_of(reply)

    state = run(make_study(rounds=1, quorum=3), Superlink(answer, SITES), tmp_path)
    assert (state.history[0]["faults"], sorted(state.history[0]["sites"])) == ([], ["Alder", "Birch", "Cedar"])


def question(node: int = 13) -> Message:
    content = RecordDict({ARRAYS: ArrayRecord({"a": Array(np.zeros(3, np.float32))}), CONFIG: ConfigRecord({"server-round": 1})})
    return Message(content, dst_node_id=node, message_type="train")


def slow(*held_back: int) -> tuple[Superlink, dict[str, bytes]]:
    """Return a SuperLink to which Cedar sent all but these parts, and the parts."""
    rest = dict[str, bytes]()

    def answer(message: Message, site: str) -> Parts:
        loss = MetricRecord({"loss": float(message.metadata.dst_node_id)})
        number, numbers, contents = parts_of(Message(RecordDict({NUMBERS: loss}), reply_to=message))
        rest.update({numbers[place]: contents.pop(numbers[place]) for place in held_back if site == "Cedar"})
        return number, numbers, contents

    return Superlink(answer, SITES), rest


@pytest.mark.parametrize("held_back", [(0,), (1,), (2,), (0, 1, 2)])
def test_a_reply_that_is_not_all_there_holds_nobody_beyond_the_deadline(held_back: tuple[int, ...]) -> None:
    superlink, rest = slow(*held_back)
    grid, began, late = one_by_one(superlink.grid()), time.monotonic(), set[str]()
    replies = ask(grid, map(question, SITES), deadline_s=0.5, poll_s=0.05, late=late)
    assert 0.4 < time.monotonic() - began < 3.0, "Flower polls on until its own session ends"
    assert sorted(reply.metadata.src_node_id for reply in replies) == [11, 12]
    assert len(late) == 1
    superlink.objects |= rest
    (reply,) = grid.pull_messages(late)  # it is not lost: the guard says of it that it came late
    assert reply.content[NUMBERS]["loss"] == 13.0
    assert len(superlink.confirmed) == 3


def test_a_reply_whose_rest_will_not_come_is_an_unfinished_part_of_the_round() -> None:
    superlink, rest = slow(0)
    grid = one_by_one(superlink.grid())
    ids = list(grid.push_messages([question()]))
    assert list(grid.pull_messages(ids)) == []
    superlink.lost |= set(rest)  # the time for sending it is over
    (reply,) = grid.pull_messages(ids)
    assert (reply.error.code, reply.metadata.src_node_id) == (1304, 13)


def test_a_reply_that_comes_by_drops_is_given_up_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    superlink, _ = slow(0)
    grid, clock = one_by_one(superlink.grid()), [0.0]
    monkeypatch.setattr(arriving, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    ids = list(grid.push_messages([question()]))
    assert list(grid.pull_messages(ids)) == []
    clock[0] = arriving.LONGEST_S + 1.0
    (reply,) = grid.pull_messages(ids)
    assert reply.error.code == 1304
    assert not grid._under_way


def test_a_grid_in_memory_is_left_as_it_is_and_flowers_own_is_not() -> None:
    wire = Wire(honest)
    assert one_by_one(wire) is wire  # type: ignore[arg-type]
    assert isinstance(one_by_one(Superlink(lambda *_: None, SITES).grid()), Arriving)


def test_a_run_takes_its_replies_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = list[object]()
    monkeypatch.setattr(app, "run_study", lambda grid, path, run: found.append(grid))
    context = SimpleNamespace(run_config={"study": str(tmp_path / "study.toml")}, run_id=RUN)
    app.main(Superlink(lambda *_: None, SITES).grid(), context)
    assert [type(grid) for grid in found] == [Arriving]

"""Receipts: what a site's records had come to is handed back to it, and an answer that fell behind is refused."""

from __future__ import annotations

import gc
import json
import sqlite3
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from test_client import ask, hospital, number_of, request, site
from test_rounds import SITES, Wire

from fl_client.audit import LOG, read_log
from fl_client.ledger import FILE, read_ledger
from fl_client.participant import Participant
from fl_client.records import Records
from fl_server.receipts import Receipted, behind, keep_receipt, receipt
from icmoe.chain import digest_of
from icmoe.errors import IcmoeError
from icmoe.messages import ARRAYS, CONFIG, NUMBERS, ROUND_KEY, STUDY_KEY
from icmoe.receipts import (
    AUDIT_KEY,
    AUDIT_RECEIPT_KEY,
    EMPTY,
    LEDGER_KEY,
    RECEIPT_KEY,
    Head,
    head_of,
    numbers_of,
    receipt_of,
    receipt_text,
)

__all__ = ["hospital", "site"]
HEADS = st.builds(Head, st.integers(0, 5), st.sampled_from(["a" * 64, "b" * 64]))


def wire(heads: dict[str, Head | None]) -> Wire:
    """Return a wire whose sites answer with these heads."""

    def answer(message: Message, name: str) -> Message:
        numbers = MetricRecord({"loss": 1.0})
        if heads.get(name) is not None:
            numbers[LEDGER_KEY] = numbers_of(heads[name])
        return Message(RecordDict({NUMBERS: numbers}), reply_to=message)

    return Wire(answer)


def rounds(grid: Receipted, kind: str = "train") -> dict[str, Message]:
    """Ask every site with one shared content, as strategies do, and return the replies by site."""
    content = RecordDict({CONFIG: ConfigRecord({STUDY_KEY: "0" * 64, ROUND_KEY: 1})})
    ids = grid.push_messages([Message(content, dst_node_id=node, message_type=kind) for node in SITES])
    assert RECEIPT_KEY not in content[CONFIG]
    return {SITES[reply.metadata.src_node_id]: reply for reply in grid.pull_messages(ids)}


def told(network: Wire) -> dict[str, Head | None]:
    last = network.asked[-len(SITES) :]
    return {SITES[one.metadata.dst_node_id]: receipt_of(one.content[CONFIG].get(RECEIPT_KEY)) for one in last}


def test_each_site_gets_its_own_receipt_with_the_next_round_also_after_a_restart(tmp_path: Path) -> None:
    heads = {"Alder": Head(3, "a" * 64), "Birch": Head(9, "b" * 64), "Cedar": None}
    network = wire(heads)
    grid = Receipted(network, SITES, tmp_path / "receipts")
    rounds(grid)
    assert set(told(network).values()) == {None}
    rounds(Receipted(network, SITES, tmp_path / "receipts"))
    assert told(network) == heads
    rounds(Receipted(network, SITES, tmp_path / "receipts"), "evaluate")
    assert set(told(network).values()) == {None}  # a question to score carries none


def test_an_answer_belongs_to_the_very_message_that_was_asked(tmp_path: Path) -> None:
    """The guard knows by it which round an update is for; with a copy in between every update would look late."""
    keep_receipt(tmp_path, "Alder", Head(3, "a" * 64))
    asked = Message(RecordDict({CONFIG: ConfigRecord({STUDY_KEY: "0" * 64, ROUND_KEY: 2})}), dst_node_id=11, message_type="train")
    grid = Receipted(wire({"Alder": Head(4, "d" * 64)}), SITES, tmp_path)
    (reply,) = grid.pull_messages(grid.push_messages([asked]))
    assert reply.metadata.reply_to_message_id == asked.metadata.message_id
    assert RECEIPT_KEY in asked.content[CONFIG]


@pytest.mark.parametrize("back", [Head(2, "a" * 64), Head(3, "c" * 64), None])
def test_an_answer_that_fell_behind_its_receipt_is_refused_by_number(back: Head | None, tmp_path: Path, capsys) -> None:
    keep_receipt(tmp_path, "Alder", Head(3, "a" * 64))
    network = wire({"Alder": back, "Birch": Head(1, "b" * 64)})
    replies = rounds(Receipted(network, SITES, tmp_path))
    assert number_of(replies["Alder"]) == 418
    assert replies["Alder"].metadata.src_node_id == 11
    assert not replies["Birch"].has_error()
    assert receipt(tmp_path, "Alder") == Head(3, "a" * 64)
    assert "ICM418 Alder: site's ledger went back" in capsys.readouterr().err


def test_what_a_silent_site_was_asked_is_not_kept_from_round_to_round(tmp_path: Path) -> None:
    """Each message holds the whole global model; the answer to an earlier round is refused by the guard in any case."""
    network = Wire(lambda message, name: None if name == "Cedar" else Message(RecordDict({}), reply_to=message))
    grid, contents = Receipted(network, SITES, tmp_path), []
    for number in range(1, 6):
        content = RecordDict({CONFIG: ConfigRecord({STUDY_KEY: "0" * 64, ROUND_KEY: number})})
        contents.append(weakref.ref(content))
        ids = grid.push_messages([Message(content, dst_node_id=node, message_type="train") for node in SITES])
        assert len(list(grid.pull_messages(ids))) == 2
        network.asked.clear()
        del content
    gc.collect()
    assert [one() for one in contents] == [None] * 5
    assert len(grid._sent) == 1  # what Cedar may still answer


def test_a_late_answer_counts_against_the_receipt_of_its_own_question(tmp_path: Path) -> None:
    keep_receipt(tmp_path, "Alder", Head(3, "a" * 64))
    network = Wire(lambda message, name: None)
    grid = Receipted(network, SITES, tmp_path)
    asked = [ConfigRecord({STUDY_KEY: "0" * 64, ROUND_KEY: number}) for number in (1, 1, 2)]
    messages = [Message(RecordDict({CONFIG: one}), dst_node_id=11, message_type="train") for one in asked]
    ids = [number for message in messages[:2] for number in grid.push_messages([message])]
    for message, head in ((messages[0], Head(2, "b" * 64)), (messages[1], Head(4, "d" * 64))):
        network.deliver(message, wire({"Alder": head}).answer)
    first, second = grid.pull_messages(ids)
    assert (number_of(first), second.has_error()) == (418, False)
    assert receipt(tmp_path, "Alder").count == 4
    old = grid.push_messages([messages[2]])
    grid.push_messages([Message(RecordDict({CONFIG: ConfigRecord({ROUND_KEY: 3})}), dst_node_id=11, message_type="train")])
    network.deliver(messages[2], wire({"Alder": Head(6, "f" * 64)}).answer)
    assert not next(iter(grid.pull_messages(old))).has_error()
    assert receipt(tmp_path, "Alder").count == 6


def test_answers_of_two_studies_may_arrive_out_of_order(tmp_path: Path) -> None:
    first, second = (Receipted(wire({"Alder": Head(n, f"{n}" * 64)}), SITES, tmp_path) for n in (5, 6))
    content = RecordDict({CONFIG: ConfigRecord({STUDY_KEY: "0" * 64, ROUND_KEY: 1})})
    ids = [grid.push_messages([Message(content, dst_node_id=11, message_type="train")]) for grid in (first, second)]
    assert not next(iter(second.pull_messages(ids[1]))).has_error()
    assert not next(iter(first.pull_messages(ids[0]))).has_error()
    assert receipt(tmp_path, "Alder").count == 6


@given(head=HEADS, given_=HEADS)
def test_only_a_longer_ledger_or_the_same_is_not_behind(head: Head, given_: Head) -> None:
    assert behind(head, given_) == (head.count <= given_.count and head != given_ and given_ != EMPTY)


def test_a_receipt_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    for text in ("", "3", "3:xyz", "-1:" + "0" * 64):
        (tmp_path / "Alder.receipt").write_text(text)
        assert receipt(tmp_path, "Alder") == EMPTY


def test_a_site_refuses_a_receipt_for_what_its_ledger_lacks(site: Participant, tmp_path: Path) -> None:
    audited = replace(site, audited=True, state_folder=tmp_path / "state")
    study = audited.studies[0]
    assert not ask(audited, request(study)).has_error()
    head = read_ledger(audited.state_folder, "Alder").head
    good = request(study, 2, **{RECEIPT_KEY: receipt_text(head)})
    good[ARRAYS] = request(study, 2)[ARRAYS]
    assert not ask(audited, good).has_error()
    for bad in (Head(9, head.digest), Head(head.count, "f" * 64)):
        assert number_of(ask(audited, request(study, 2, **{RECEIPT_KEY: receipt_text(bad)}))) == 413, (
            "nothing stored is sent either"
        )
    assert number_of(ask(audited, request(study, 2, **{RECEIPT_KEY: "soon"}))) == 301
    assert number_of(ask(audited, request(study, 2, **{RECEIPT_KEY: receipt_text(head)}), "evaluate")) == 301


def test_the_last_line_of_a_sites_audit_log_is_handed_back_with_the_next_round(tmp_path: Path) -> None:
    line = Head(7, "c" * 64)
    network = Wire(
        lambda message, _: Message(RecordDict({NUMBERS: MetricRecord({AUDIT_KEY: numbers_of(line)})}), reply_to=message)
    )
    rounds(Receipted(network, SITES, tmp_path))
    rounds(Receipted(network, SITES, tmp_path))
    given = {receipt_of(one.content[CONFIG].get(AUDIT_RECEIPT_KEY)) for one in network.asked[-len(SITES) :]}
    assert given == {line}
    assert all(RECEIPT_KEY not in one.content[CONFIG] for one in network.asked), "the ledger has a receipt of its own"


def test_an_audit_log_that_was_written_anew_stops_the_site(site: Participant, tmp_path: Path) -> None:
    """Whoever may write the folder, without the site's key, can make a log that agrees with itself and with the ledger."""
    audited = replace(site, audited=True, state_folder=tmp_path / "state")
    study, records = audited.studies[0], audited.records
    told = head_of(list(ask(audited, request(study)).content[NUMBERS][AUDIT_KEY]))
    next_round = request(study, 2, **{AUDIT_RECEIPT_KEY: receipt_text(told)})
    _write_anew(records, digest="f" * 64)
    records.verify()  # finds nothing
    assert number_of(ask(audited, next_round)) == 321
    assert number_of(ask(audited, request(study, 2, **{AUDIT_RECEIPT_KEY: "soon"}))) == 301


def test_the_last_line_of_a_log_is_compared_too(site: Participant, tmp_path: Path) -> None:
    records = replace(site, audited=True, state_folder=tmp_path / "state").records
    last = [records.write("refused", {"number": number}) for number in (301, 302)][-1]
    records.require(None, last)
    with pytest.raises(IcmoeError, match="ICM321"):
        records.require(None, Head(last.count, "f" * 64))
    with pytest.raises(IcmoeError, match="as the coordinator's receipt says"):
        records.require(None, Head(last.count + 1, last.digest))


def _write_anew(records: Records, digest: str) -> None:
    """Write another digest of what was sent, chain the lines again and let the ledger know of the last one."""
    *before, last = read_log(records.state)
    entry = {**last, "digest": digest}
    entry["hash"] = digest_of(entry)
    (records.state / LOG).write_text("".join(json.dumps(one) + "\n" for one in [*before, entry]))
    with sqlite3.connect(records.state / FILE) as connection:
        connection.execute("update audit set digest = ?", (entry["hash"],))
    connection.close()

"""Whom a run waits for stands beside the study while it waits: names, deadline, answers; whoever reads it disturbs nothing."""

from __future__ import annotations

import fcntl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from flwr.app import Message
from test_rounds import ROSTER, SITES, Wire, honest, registered

from fl_server.app import make_strategy, only_run_of, start_state
from fl_server.beside import is_held, lock_path
from fl_server.rounds import run_rounds
from fl_server.waiting import Wait, begun, read_wait, wait_path, write_wait
from icmoe.errors import IcmoeError
from icmoe.messages import CONFIG, ROUND_KEY
from icmoe.study import Study


def waits_of(study: Study, wire: Wire) -> list[Wait]:
    seen: list[Wait] = []
    strategy, state = make_strategy(study, ROSTER), start_state(study)
    run_rounds(wire, strategy, study, state, sites=SITES, commit=lambda now: None, poll_s=0.01, watch=seen.append)
    return seen


def test_a_wait_names_who_was_asked_who_answered_and_who_is_not_connected(make_study) -> None:
    nodes = [registered(11, "Alder"), registered(12, "Birch", "offline"), registered(13, "Cedar")]
    before = datetime.now(UTC)
    seen = waits_of(make_study(rounds=1, quorum=2, deadline_s=60.0), Wire(honest, nodes))
    connection, asked, *_ = seen
    assert (connection.kind, connection.round, connection.sites) == ("connection", 1, ("Alder", "Birch", "Cedar"))
    assert (asked.kind, asked.asked, asked.offline, asked.answered) == ("answers", ("Alder", "Cedar"), ("Birch",), ())
    assert asked.awaited == ("Alder", "Cedar")
    assert before + timedelta(seconds=60) <= asked.until <= datetime.now(UTC) + timedelta(seconds=60)
    answered = [wait for wait in seen if wait.what == "round 1 of 1" and wait.kind == "answers"]
    assert [len(wait.awaited) for wait in answered] == [2, 1, 0]  # both come with one look, in any order
    assert seen[-1].what == "closing evaluation"
    assert seen[-1].answered == ("Alder", "Cedar")


def test_a_silent_site_stays_awaited_and_each_attempt_is_a_wait_of_its_own(make_study) -> None:
    def answer(message: Message, site: str) -> Message | None:
        return None if site == "Cedar" and message.content[CONFIG].get(ROUND_KEY) == 1 else honest(message, site)

    wire = Wire(answer)
    seen: list[Wait] = []
    study = make_study(rounds=1, quorum=3, retries=1, deadline_s=0.2)
    with pytest.raises(IcmoeError, match="ICM515"):
        run_rounds(
            wire,
            make_strategy(study, ROSTER),
            study,
            start_state(study),
            sites=SITES,
            commit=lambda now: None,
            poll_s=0.01,
            watch=seen.append,
        )
    last = seen[-1]
    assert (last.what, last.asked, last.awaited) == ("round 1 of 1, attempt 2 of 2", ("Cedar",), ("Cedar",))


def test_a_record_reads_as_it_was_written_and_a_damaged_one_is_refused_by_number(tmp_path: Path) -> None:
    study = tmp_path / "study.toml"
    assert read_wait(study) is None
    wait = begun("answers", "round 1 of 2", 1, 5.0, ["Birch", "Alder"], asked=["Alder"], offline=["Birch"])
    write_wait(study, wait.with_answer("Alder"))
    found = read_wait(study)
    assert found is not None
    assert (found.sites, found.answered, found.awaited, found.until) == (("Alder", "Birch"), ("Alder",), (), wait.until)
    for text in (b"", b"\xff\x00", b"[]", wait.model_dump_json().encode()[:-9], b'{"kind": "answers"}', b"[" * 100_000):
        wait_path(study).write_bytes(text)
        with pytest.raises(IcmoeError) as caught:
            read_wait(study)
        assert [fault.number for fault in caught.value.faults] == [523]


def test_whether_a_run_lives_is_seen_without_keeping_the_next_one_out(tmp_path: Path) -> None:
    study = tmp_path / "study.toml"
    assert not is_held(study)
    with only_run_of(study):
        assert is_held(study)
    assert not is_held(study)
    with lock_path(study).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nothing was kept

"""The record of the rounds: the same after any commits and any kill, written once, and not held in memory."""

from __future__ import annotations

import tracemalloc
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_rounds import run

from fl_server.round_log import RoundLog, last_score
from fl_server.run_state import RunState, newest_readable
from icmoe.errors import IcmoeError


def row(number: int) -> dict[str, Any]:
    return {"round": number, "val_dice": None if number % 3 == 0 else number / 7, "sites": {"Hôpital": {"loss": 0.1 * number}}}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    commits=st.lists(st.integers(0, 4), min_size=1, max_size=6),
    unfinished=st.binary(max_size=60),
    taken=st.slices(20),
)
def test_it_is_the_list_of_its_records_however_it_was_committed(
    commits: list[int], unfinished: bytes, taken: slice, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path, log, kept = tmp_path_factory.mktemp("log") / "s.rounds.jsonl", RoundLog(), []
    for count in commits:
        for _ in range(count):
            kept.append(row(len(kept) + 1))
            log.append(row(len(kept)))
        settled, last = log.settle(path)
        with path.open("ab") as file:
            file.write(unfinished)  # a commit that was killed before its state was written
        log = RoundLog.opened(path, asdict(settled), last)
    assert (list(log), len(log), log[taken]) == (kept, len(kept), kept[taken])
    assert log == kept
    assert [log[index] for index in range(-len(kept), len(kept))] == kept + kept
    with pytest.raises(IndexError):
        log[len(kept)]
    assert last_score(log) == next((one["val_dice"] for one in reversed(kept) if one["val_dice"] is not None), None)
    log.settle(path)
    assert path.read_bytes().count(b"\n") == max(0, len(kept) - 1)  # what was never finished is gone


def test_a_commit_writes_only_what_is_new(tmp_path: Path) -> None:
    path, log = tmp_path / "s.rounds.jsonl", RoundLog([row(1), row(2)])
    log.settle(path)
    before = path.read_bytes()
    path.write_bytes(b"x" * len(before))  # would be mended if it were written again
    log.append(row(3))
    log.settle(path)
    assert path.read_bytes().startswith(b"x" * len(before))


def test_the_last_record_is_found_without_reading_the_others(tmp_path: Path) -> None:
    log, path = RoundLog([row(number) for number in range(1, 5)]), tmp_path / "s.rounds.jsonl"
    log.settle(path)
    path.unlink()
    assert (log[-1], log[3:]) == (row(4), [row(4)])


def test_the_last_score_can_still_be_entered_and_no_earlier_one(tmp_path: Path) -> None:
    log = RoundLog([row(1), row(2)])
    log.settle(tmp_path / "log")
    log[-1]["val_dice"] = 0.75
    log.append(row(3))
    log.settle(tmp_path / "log")
    assert log[1]["val_dice"] == 0.75


@pytest.mark.parametrize("damage", ["a digit", "cut", "gone", "a folder"])
def test_a_log_that_is_not_what_the_commit_left_is_refused_by_number(damage: str, make_study, tmp_path: Path) -> None:
    study, path = make_study(rounds=3), tmp_path / "s"
    run(study, path)
    log = tmp_path / "s.rounds.jsonl"
    content = log.read_bytes()
    log.unlink()
    if damage == "a digit":
        log.write_bytes(content.replace(b'"round": 1', b'"round": 7'))
    elif damage == "cut":
        log.write_bytes(content[:-1])
    elif damage == "a folder":
        log.mkdir()
    with pytest.raises(IcmoeError, match="ICM502"):
        RunState.load(path, study)


def test_an_older_commit_reads_its_part_of_the_log_and_the_run_goes_on_from_there(make_study, tmp_path: Path) -> None:
    study, path = make_study(rounds=4), tmp_path / "s"
    whole = run(study, path, keep=3)
    path.unlink()
    path.write_bytes(b"damaged")
    kept, faults = newest_readable(path, study)
    assert [fault.number for fault in faults] == [517]
    assert kept is not None
    assert (kept.round, len(kept.history)) == (4, 4)  # the closing evaluation is repeated
    (tmp_path / "s.00004").unlink()
    kept, _ = newest_readable(path, study)
    assert kept is not None
    assert (kept.round, [record["round"] for record in kept.history]) == (3, [1, 2, 3])
    again = run(study, path, keep=3)
    strip = [{**record, "seconds": None} for record in whole.history]
    assert [{**record, "seconds": None} for record in again.history] == strip
    assert RunState.load(path, study).history == again.history


def test_memory_does_not_hold_what_was_settled(tmp_path: Path) -> None:
    """The rows of 400 rounds with 60 kB each; opening, reading and going on take a few of them at a time."""
    path, big = tmp_path / "log", {"sites": {f"site-{index}": [0.5] * 10 for index in range(1000)}, "val_dice": None}
    log = RoundLog()
    for number in range(400):
        log.append({"round": number, **big})
        settled, last = log.settle(path)
    size_bytes = path.stat().st_size / 400
    tracemalloc.start()
    log = RoundLog.opened(path, asdict(settled), last)
    assert [record["round"] for record in log] == list(range(400))
    log.append({"round": 400, **big})
    log.settle(path)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size_bytes > 50_000
    assert held < 10 * size_bytes
    assert peak < 60 * size_bytes  # a record in memory is some times its line

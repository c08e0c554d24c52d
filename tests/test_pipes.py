"""A named pipe in place of a file of state keeps no command waiting: it is damage like any other."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest
from hospitals import Hospital, authority, hospital, prepared
from test_rounds import run as run_rounds_here
from typer.testing import CliRunner

from fl_client import cli
from fl_client.doing import FILE, LOCK, SAID
from fl_client.supervisor import only_one
from fl_server.beside import is_held, lock_path, read_lifted
from fl_server.receipts import receipt
from fl_server.round_log import RoundLog
from fl_server.run_state import RunState, latest_state
from fl_server.submit import StudyFolder
from fl_server.waiting import read_wait, wait_path
from icmoe.atomic import read_regular
from icmoe.errors import IcmoeError
from icmoe.receipts import EMPTY
from icmoe.study import Study
from icmoe.tensor_file import read_tensors

__all__ = ["authority", "hospital", "prepared"]


@pytest.fixture(autouse=True)
def _soon() -> Iterator[None]:
    def late(*_: object) -> NoReturn:
        pytest.fail("waits for the other end of a pipe")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def piped(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    return path


def asked(hospital: Hospital, *words: str) -> tuple[int, str]:
    done = CliRunner().invoke(cli.app, ["--site", "Alder", "--config", str(hospital.path), *words], terminal_width=200)
    return done.exit_code, done.output


@pytest.mark.parametrize("name", [SAID, LOCK, FILE, "supervisor.lock"])
def test_status_does_without_what_is_only_told(hospital: Hospital, name: str) -> None:
    piped(hospital.folder / "state" / name)
    code, output = asked(hospital, "status")
    assert (code, "has not taken part yet" in output) == (0, True)


@pytest.mark.parametrize("words", ["status", "approvals", "show", "check"])
def test_an_approval_that_is_a_pipe_is_refused_by_number(hospital: Hospital, words: str) -> None:
    piped(next((hospital.folder / "state/approvals").glob("*.json")))
    code, output = asked(hospital, words)
    assert (code, "ICM321" in output) == (1, True), output


@pytest.mark.parametrize("name", ["ledger.sqlite", "audit.jsonl"])
@pytest.mark.parametrize("words", ["status", "history", "report", "ledger", "audit verify"])
def test_records_that_are_pipes_are_refused_by_number(hospital: Hospital, name: str, words: str) -> None:
    piped(hospital.folder / "state" / name)
    code, output = asked(hospital, *words.split())
    assert (code, "ICM205 " in output) == (1, True), output


@pytest.mark.parametrize("words", ["status", "ledger", "audit verify", "withdraw tiny"])
@pytest.mark.parametrize("target", ["nowhere", "ledger.sqlite"])
def test_a_ledger_that_is_a_link_to_nothing_is_no_new_one(hospital: Hospital, target: str, words: str) -> None:
    path = hospital.folder / "state/ledger.sqlite"
    path.unlink()
    path.symlink_to(target)
    code, output = asked(hospital, *words.split())
    assert (code, "ICM205 " in output) == (1, True), output
    assert not path.exists()


def test_a_site_does_not_wait_for_its_own_lock(tmp_path: Path) -> None:
    piped(tmp_path / "supervisor.lock")
    with pytest.raises(OSError, match=r"supervisor\.lock"), only_one(tmp_path):
        pytest.fail("held a pipe")


def test_a_coordinator_does_not_wait_for_what_lies_beside_its_study(tmp_path: Path) -> None:
    study = tmp_path / "study.toml"
    for path in (lock_path(study), study.with_suffix(".lifted.json"), wait_path(study), tmp_path / "run.json"):
        piped(path)
    folder = StudyFolder(tmp_path)
    assert (is_held(study), read_lifted(study), folder.run_id, folder.faults()) == (False, {}, "", [])
    with pytest.raises(IcmoeError, match="ICM523"):
        read_wait(study)
    assert receipt(piped(tmp_path / "Alder.receipt").parent, "Alder") == EMPTY


def test_a_commit_that_is_a_pipe_or_a_link_to_nothing_is_damaged(make_study, tmp_path: Path) -> None:
    study: Study = make_study()
    path = piped(tmp_path / "s")
    with pytest.raises(IcmoeError, match="ICM502"):
        RunState.load(path, study)
    path.unlink()
    path.symlink_to(path.name)
    with pytest.raises(IcmoeError, match="ICM502"):
        latest_state(path, study)


def test_the_log_of_the_rounds_may_be_no_pipe(make_study, tmp_path: Path) -> None:
    study: Study = make_study(rounds=2)
    run_rounds_here(study, tmp_path / "s")
    piped(tmp_path / "s.rounds.jsonl")
    with pytest.raises(IcmoeError, match="ICM502"):
        RunState.load(tmp_path / "s", study)
    with pytest.raises(OSError, match="rounds"):
        RoundLog([{"round": 1}, {"round": 2}]).settle(tmp_path / "s.rounds.jsonl")


def test_neither_pipes_nor_devices_are_read(tmp_path: Path) -> None:
    for path in (piped(tmp_path / "pipe"), Path("/dev/zero"), tmp_path):
        for read in (read_regular, read_tensors):
            with pytest.raises(OSError, match="not a regular file"):
                read(path)

"""A hospital killed at random instants of its training: what is spent on disk is never below what was really taken."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_client import command, hospital, write_site_file, write_study_file

from fl_client.credentials import make_node_key
from fl_client.ledger import read_ledger
from fl_client.records import Records
from fl_client.signing import Signer
from icmoe.study import Study

__all__ = ["hospital"]
ROOT = Path(__file__).parents[1]
STEPS, KILLS = 6, 20
PRIVACY = {"noise_multiplier": 2.0, "delta": 0.1, "patients": 2, "sample_rate": 0.5, "steps": STEPS, "accountant": "rdp"}


@pytest.fixture
def killed(hospital: Path, make_study, tmp_path: Path) -> tuple[Path, Study]:
    """A hospital that approved a private study, with features, a key and a budget that these tests do not reach."""
    study = make_study(rounds=KILLS, privacy={"site": PRIVACY})  # it may spend twice its rounds, and each kill costs one
    path = write_site_file(tmp_path, hospital)
    make_node_key(tmp_path / "node.key")
    section = '[coordinator]\naddress = "localhost:443"\nca = "ca.crt"\nkey = "node.key"\n'
    path.write_text(f'{path.read_text()}\n{section}[budget]\nepsilon = 1000.0\ndelta = 0.1\naccountant = "rdp"\n')
    for words in (["approve", str(write_study_file(tmp_path / "study.toml", study)), "--yes"], ["prepare"]):
        done = command(path, *words)
        assert done.exit_code == 0, done.output
    return tmp_path, study


@contextmanager
def started(folder: Path, study: Study, order: str = "first") -> Iterator[subprocess.Popen[str]]:
    words = [sys.executable, str(ROOT / "tests/killed_site.py"), str(folder), study.digest, order]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    site = subprocess.Popen(words, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert site.stdout.readline() == "ready\n"
        yield site
    finally:
        site.kill()
        site.wait(timeout=20)


def kill_once(site: subprocess.Popen[str], folder: Path, chosen: random.Random) -> None:
    """Start a process and kill it at a random instant: so many steps on, and a little while more."""
    wanted = steps_taken(folder) + chosen.choice((0, 0, *range(1, 3 * STEPS)))
    site.stdin.write("go\n")
    site.stdin.flush()
    child = int(site.stdout.readline())
    ends = time.monotonic() + 120.0
    while steps_taken(folder) < wanted:
        assert time.monotonic() < ends, "the site does not get on"
        time.sleep(0.002)
    time.sleep(chosen.uniform(0.0, 0.3))
    os.kill(child, signal.SIGKILL)
    assert site.stdout.readline() == "ended\n"


def steps_taken(folder: Path) -> int:
    path = folder / "steps"
    return path.stat().st_size if path.exists() else 0


def paid_and_taken(folder: Path) -> tuple[int, int]:
    """Return the steps that the ledger knows of and those that were taken."""
    entries = read_ledger(folder / "state", "Alder").entries
    return sum(count for entry in entries for *_, count in entry.releases or ()), steps_taken(folder)


def test_twenty_kills_never_leave_a_step_unpaid(killed: tuple[Path, Study]) -> None:
    folder, study = killed
    records = Records(state=folder / "state", site="Alder", signer=Signer(folder / "node.key"))
    chosen, unfinished = random.Random(6), 0
    with started(folder, study) as site:
        for _ in range(KILLS):
            kill_once(site, folder, chosen)
            paid, taken = paid_and_taken(folder)
            assert paid >= taken
            unfinished += paid > taken
            records.verify()  # and both records are whole and agree
    assert taken > STEPS * 3, "so much was trained that the kills could hit something"
    assert unfinished, "a kill hit a round that was paid for and not yet at its end"
    updates: dict[tuple[str, str], set[str]] = {}
    rows = [line.split() for line in (folder / "sent").read_text().splitlines() if line.count(" ") == 2]
    for number, seed, norm in rows:
        updates.setdefault((number, seed), set()).add(norm)
    releases = sum(len(norms) for norms in updates.values())
    assert releases * STEPS <= paid, "each update that left is paid for"
    assert len(rows) > releases, "the same question got the same bytes again"


def test_a_site_that_paid_after_training_would_be_caught(killed: tuple[Path, Study]) -> None:
    folder, study = killed
    chosen, caught = random.Random(6), False
    with started(folder, study, "late") as site:
        for _ in range(KILLS):
            kill_once(site, folder, chosen)
            paid, taken = paid_and_taken(folder)
            if caught := paid < taken:
                break
    assert caught

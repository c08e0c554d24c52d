"""Ingest killed at many moments of its work ends with the same index and the same files as an undisturbed one."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from exports import export_of, taken, write_series

TESTS = Path(__file__).resolve().parent
PATIENTS, ROUNDS, MOST_ROUNDS = 16, 6, 30
SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
import exports
from icmoe.data.ingest import work
if __name__ == "__main__":
    work.BATCH_FILES = 4  # many transactions, so that there is much to interrupt
    print("begins", flush=True)
    export = exports.export_of(Path(sys.argv[1]), Path(sys.argv[2]))
    exports.ingest(export, on_progress=lambda step, done, total: print(step, done, total, flush=True))
"""
TABLES = ("meta", "file", "series", "frame", "left_out", "forgotten")


def started(root: Path, place: Path) -> subprocess.Popen[str]:
    command = [sys.executable, str(root / "run.py"), str(root / "export"), str(place), str(TESTS)]
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent)}
    return subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.PIPE, text=True)


def rows(store: Path) -> dict[str, list[tuple[object, ...]]]:
    if not store.exists():  # killed before there was a folder
        return {name: [] for name in TABLES}
    connection = sqlite3.connect(store / "index.sqlite")
    try:
        return {name: sorted(connection.execute(f"select * from {name}")) for name in TABLES}
    except sqlite3.OperationalError:  # killed before there was a table
        return {name: [] for name in TABLES}
    finally:
        connection.close()


def contents(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}


def with_secret(place: Path) -> Path:
    place.mkdir()
    (place / "secret.key").write_bytes(bytes(range(32)))
    (place / "secret.key").chmod(0o600)
    return place


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """Return a folder with an export and its index in "whole", and how many steps of progress the work has."""
    root = tmp_path_factory.mktemp("kill")
    for number in range(PATIENTS):
        write_series(root / f"export/{number}", f"patient {number}", 3, seed=number)
    (root / "run.py").write_text(SCRIPT)
    process = started(root, with_secret(root / "whole"))
    lines = process.communicate(timeout=120)[0].splitlines()
    assert process.returncode == 0
    assert len(lines) == 1 + 1 + 6 * PATIENTS // 4 + 1 + PATIENTS, "the begin of each step, one per batch of files and series"
    return root, len(lines)


def killed(step: int, delay_s: float, root: Path, place: Path) -> bool:
    """Kill an ingest with all its processes a moment after a step; return whether it was still at work."""
    process = started(root, place)
    assert process.stdout is not None
    reached = [line for _, line in zip(range(step), process.stdout, strict=False)]
    time.sleep(delay_s)
    at_work = process.poll() is None and len(reached) == step
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    return at_work


def test_killed_at_any_moment_it_ends_the_same(undisturbed: tuple[Path, int]):
    root, steps = undisturbed
    want, files = rows(root / "whole/store"), contents(root / "whole/store")
    assert len(want["frame"]) == 3 * PATIENTS
    moments = random.Random(5)
    hits = {"reading": 0, "decoding": 0}
    for number in range(MOST_ROUNDS):  # how far the work is at a moment is up to the machine: as many as it takes to hit both
        if number >= ROUNDS and min(hits.values()) >= 2:
            break
        place = with_secret(root / f"killed{number}")
        for later in (False, True):  # the second time it begins where the first one left it
            step = 1 + moments.randrange(steps // 2) if not later else 1 + moments.randrange(PATIENTS)
            at_work = killed(step, moments.uniform(0.0, 0.02), root, place)
            left = rows(place / "store")
            hits["reading"] += at_work and 0 < len(left["file"]) < len(want["file"])
            hits["decoding"] += at_work and 0 < len(left["series"]) < len(want["series"])
        taken(export_of(root / "export", place))
        assert rows(place / "store") == want, number
        found = contents(place / "store")
        assert found.keys() == files.keys(), "no frame is missing and nothing is left over"
        assert all(found[name] == files[name] for name in files if not name.startswith("index.sqlite")), number
    assert min(hits.values()) >= 2, hits


def alive_in(group: int) -> list[str]:
    """Return the processes of a group that are neither gone nor waiting to be buried."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, its_group = path.read_text().rpartition(")")[2].split()[:3]
            if its_group == str(group) and state not in {"Z", "X"}:
                found.append(path.parent.name)
    return found


def test_no_worker_outlives_a_killed_ingest(undisturbed: tuple[Path, int]):
    root, _ = undisturbed
    process = started(root, with_secret(root / "alone"))
    assert process.stdout is not None
    assert [process.stdout.readline().split()[0] for _ in range(3)] == ["begins", "read", "read"]
    assert len(alive_in(process.pid)) > 2
    process.kill()
    process.wait(timeout=60)
    deadline = time.monotonic() + 30
    try:
        while alive_in(process.pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert alive_in(process.pid) == []
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

"""Locks between processes: one waits for the other, and no longer than it may."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from clocks import Clock

from fl_client.approval import one_at_a_time
from fl_client.audit import LOG, read_log, record
from icmoe import locks
from icmoe.errors import Fault, IcmoeError
from icmoe.locks import claim, hold, is_locked


@pytest.fixture
def taken(tmp_path: Path) -> Iterator[int]:
    """A file that another descriptor, as good as another process, has locked."""
    (tmp_path / "lock").touch()
    with (tmp_path / "lock").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def test_a_lock_that_is_held_for_too_long_is_an_error_that_names_the_file(taken: int, tmp_path: Path) -> None:
    with (tmp_path / "lock").open("rb") as file, pytest.raises(TimeoutError) as raised:
        hold(file, name=tmp_path / "lock", deadline_s=0.05)
    assert raised.value.errno == errno.ETIMEDOUT
    assert (raised.value.filename, raised.value.strerror) == (str(tmp_path / "lock"), "another process has held it for 0.05 s")
    assert is_locked(tmp_path / "lock")


def test_another_process_at_work_is_named_in_words_of_the_caller(taken: int, tmp_path: Path) -> None:
    with (tmp_path / "lock").open("rb") as file, pytest.raises(IcmoeError) as raised:
        claim(file, Fault(number=325, where="here", what="somebody is at work"))
    assert raised.value.faults == (Fault(number=325, where="here", what="somebody is at work"),)
    fcntl.flock(taken, fcntl.LOCK_UN)
    with (tmp_path / "lock").open("rb") as file:
        claim(file, Fault(number=325))
        assert is_locked(tmp_path / "lock")


def test_who_only_looks_whether_a_lock_is_held_is_no_other_process_at_work(tmp_path: Path) -> None:
    (tmp_path / "lock").touch()
    with (tmp_path / "lock").open("rb") as looking, (tmp_path / "lock").open("rb") as file:
        fcntl.flock(looking, fcntl.LOCK_SH)  # as `is_locked` does for a moment
        timer = threading.Timer(0.02, lambda: fcntl.flock(looking, fcntl.LOCK_UN))
        timer.start()
        claim(file, Fault(number=325))
        timer.join()


def test_who_waits_gets_the_lock_when_it_is_free_and_gives_it_back_by_closing(taken: int, tmp_path: Path) -> None:
    timer = threading.Timer(0.1, lambda: fcntl.flock(taken, fcntl.LOCK_UN))
    timer.start()
    with (tmp_path / "lock").open("rb") as file:
        hold(file, name=tmp_path / "lock")
        with (tmp_path / "lock").open("rb") as other, pytest.raises(TimeoutError):
            hold(other, name=tmp_path / "lock", deadline_s=0.0)
    assert not is_locked(tmp_path / "lock")


def test_a_stuck_process_costs_an_audit_line_and_an_approval_a_minute_and_nothing_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(tmp_path, "approved", {"study": "tiny"})
    before = (tmp_path / LOG).read_bytes()
    clock = Clock()
    monkeypatch.setattr(locks, "time", clock)
    with (tmp_path / LOG).open("rb") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        with pytest.raises(TimeoutError, match="held it for 60 s"):
            record(tmp_path, "withdrawn", {"study": "tiny"})
    assert 60.0 <= clock.now_s < 60.1
    assert (tmp_path / LOG).read_bytes() == before
    assert len(read_log(tmp_path)) == 1
    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        with pytest.raises(IcmoeError) as raised, one_at_a_time(tmp_path):
            pytest.fail("went on beside the other")
    finally:
        os.close(folder)
    assert raised.value.faults[0].number == 325
    assert "another approval or withdrawal" in str(raised.value)

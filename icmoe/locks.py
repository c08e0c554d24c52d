"""Locks of files between processes; the kernel takes them from a process that ends, however it ends."""

from __future__ import annotations

import errno
import fcntl
import time
from pathlib import Path
from typing import IO

from icmoe.atomic import regular
from icmoe.errors import Fault, IcmoeError

LOCK_S = 60.0
"""Time after which who still holds a lock that is kept for a moment counts as stuck: stopped, or on a share that hangs."""
GLANCE_S = 0.2
"""Time that must be given to who only looks whether a lock is held, and holds it itself for that moment."""
LOOK_S = 0.02


def hold(file: IO[bytes] | IO[str] | int, *, name: Path, deadline_s: float = LOCK_S) -> None:
    """Take the lock of an open file, which goes with its descriptor; wait while another process works under it.

    Parameters
    ----------
    file
        Open, in any mode.
    name
        Of the file, for the message.
    deadline_s
        Seconds after which waiting ends.

    Raises
    ------
    TimeoutError
        Where the other process holds it for longer.
    OSError
        On a file system without locks.
    """
    if not _taken(file, deadline_s):
        raise TimeoutError(errno.ETIMEDOUT, held_for(deadline_s), str(name))


def claim(file: IO[bytes] | IO[str] | int, busy: Fault, *, deadline_s: float = GLANCE_S) -> None:
    """Take the lock of an open file as `hold` does, or refuse the work in the caller's words.

    Parameters
    ----------
    file
        Open, in any mode.
    busy
        What to say of another process that holds it.
    deadline_s
        Seconds after which waiting ends.

    Raises
    ------
    IcmoeError
        `busy`.
    OSError
        On a file system without locks.
    """
    if not _taken(file, deadline_s):
        raise IcmoeError(busy)


def held_for(deadline_s: float) -> str:
    """Return in words that the lock was waited for."""
    return f"another process has held it for {deadline_s:g} s"


def _taken(file: IO[bytes] | IO[str] | int, deadline_s: float) -> bool:
    ends = time.monotonic() + deadline_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= ends:
                return False
            time.sleep(LOOK_S)
        else:
            return True


def is_locked(path: Path) -> bool:
    """Return whether a process holds this lock file; not where there is none, or it cannot be opened."""
    try:
        with open(path, "rb", opener=regular) as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False

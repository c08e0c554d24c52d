"""Locks of files between processes; the kernel takes them from a process that ends, however it ends."""

from __future__ import annotations

import errno
import fcntl
import time
from pathlib import Path
from typing import IO

from icmoe.atomic import regular

LOCK_S = 60.0
"""Time after which who still holds a lock that is kept for a moment counts as stuck: stopped, or on a share that hangs."""
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
    ends = time.monotonic() + deadline_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= ends:
                words = f"another process has held it for {deadline_s:g} s"
                raise TimeoutError(errno.ETIMEDOUT, words, str(name)) from None
            time.sleep(LOOK_S)
        else:
            return


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

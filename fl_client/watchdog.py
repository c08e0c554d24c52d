"""A process that ends when it must, even while a C library holds the interpreter's lock.

Neither a signal caught in Python nor a thread written in Python runs then: the first is left to the kernel, the second to
faulthandler's own thread, which needs no lock.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

START_S = 900.0
"""Seconds in which a site must have read its data, before the study's own deadline counts."""

CONNECTION_ENDED = 5
"""Exit code of a SuperNode that gave its connection up for what it said last; its supervisor starts it again."""

CHILD_LOOK_S, CHILD_GRACE_S = 1.0, 10.0

_PR_SET_PDEATHSIG = 1


def end_after(seconds: float) -> None:
    """End this process with exit code 1 after `seconds`, its stack on the standard error; replaces an earlier call."""
    faulthandler.dump_traceback_later(seconds, exit=True)


def end_with_parent(parent: int) -> None:
    """Let the kernel kill this process when process `parent`, which started it, ends however it ends.

    Parameters
    ----------
    parent
        Process that must still be the parent; if it is gone already, this process ends at once.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def end_with_child(word: str) -> threading.Event:
    """Let this process end, by SIGTERM, once a child of it has ended; return what tells that this was why.

    A process without that child would go on and do nothing. One that does not end by itself within `CHILD_GRACE_S` is ended
    with exit code 1.

    Parameters
    ----------
    word
        In the command line of the child, which may not have been started yet.
    """
    gone = threading.Event()
    threading.Thread(target=_watch_child, args=(word, gone), daemon=True).start()
    return gone


def leave(code: object) -> NoReturn:
    """End this process at once, with what it has said so far; Python would wait for every thread that is no daemon.

    Parameters
    ----------
    code
        As `sys.exit` takes it.
    """
    if not isinstance(code, int | None):
        print(code, file=sys.stderr)
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def _watch_child(word: str, gone: threading.Event) -> None:
    while not _children(word):
        time.sleep(CHILD_LOOK_S)
    while _children(word):
        time.sleep(CHILD_LOOK_S)
    gone.set()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(CHILD_GRACE_S)
    os._exit(1)


def _children(word: str) -> set[int]:
    """Return the numbers of living children; one that has ended has no command line any more."""
    found = set()
    for listed in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):
            for pid in listed.read_text().split():
                if word.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.add(int(pid))
    return found

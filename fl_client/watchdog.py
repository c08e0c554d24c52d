"""A process that ends when it must, even while a C library holds the interpreter's lock.

Neither a signal caught in Python nor a thread written in Python runs then: the first is left to the kernel, the second to
faulthandler's own thread, which needs no lock.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal

START_S = 900.0
"""Seconds in which a site must have read its data, before the study's own deadline counts."""

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

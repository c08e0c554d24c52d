"""Child processes that are started again whenever they end, and that never outlive their supervisor."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from icmoe.errors import Fault, print_faults
from icmoe.processes import asked_to_stop, next_delay

POLL_S = 0.2
GRACE_S = 10.0

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_libc = ctypes.CDLL(None)


@dataclass(slots=True)
class Child:
    """A program to keep running.

    Parameters
    ----------
    name
        As messages call it.
    command
        Program and arguments.
    environment
        Whole environment.
    delay_s
        Wait before the next start.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    delay_s: float = 0.0
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    started_s: float = 0.0
    due_s: float = 0.0

    def look(self) -> None:
        """Start the program where it is due; note its end and when to start it again. Any end counts, also a clean one."""
        now = time.monotonic()
        if self.process is None:
            if now >= self.due_s:
                self.process = _start(self.command, self.environment)
                self.started_s = now
        elif (code := self.process.poll()) is not None:
            self.delay_s = next_delay(self.delay_s, now - self.started_s)
            self.process, self.due_s = None, now + self.delay_s
            did = f"It is started again in {self.delay_s:.0f} s."
            with suppress(OSError):  # a log without room is no reason to leave
                print_faults([Fault(number=328, where=self.name, value=f"exit code {code}", did=did)])


def supervise(children: Sequence[Child]) -> None:
    """Keep `children` running until SIGTERM or SIGINT; then end them and whatever they started."""
    # What a killed child leaves behind becomes a child of this process instead of an orphan.
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    with asked_to_stop(signal.SIGTERM, signal.SIGINT) as stop:
        while not stop.asked:
            for child in children:
                child.look()
            _reap_adopted(children)
            stop.wait(POLL_S)
        _end_all()


def _start(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=_end_with_parent)  # noqa: PLW1509


def _end_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _own_processes() -> list[int]:
    return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


def _reap_adopted(children: Sequence[Child]) -> None:
    started = {child.process.pid for child in children if child.process is not None}
    for pid in _own_processes():
        if pid not in started:
            os.waitpid(pid, os.WNOHANG)


def _end_all() -> None:
    """Ask every process to end, wait `GRACE_S`, then end the rest; adopted ones follow as their parents go."""
    ends = time.monotonic() + GRACE_S
    asked: set[int] = set()
    while pids := _own_processes():
        late = time.monotonic() > ends
        for pid in pids:
            if late or pid not in asked:
                os.kill(pid, signal.SIGKILL if late else signal.SIGTERM)
                asked.add(pid)
            os.waitpid(pid, os.WNOHANG)
        time.sleep(0.05)

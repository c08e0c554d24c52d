"""Services as systemd would keep them: started again after their end, and nothing of them left behind when they end.

A control group needs rights that not every machine gives; here the environment of each process names its service.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

MARK = "ICMOE_CHAOS"
LOOK_S = 0.2
STOP_S = 30.0
KILL_S = 10.0


def processes(mark: str, session: int = 0) -> dict[int, str]:
    """Command lines by number of all living processes of a service: by its mark or, as nginx writes over it, its session."""
    wanted, found = f"{MARK}={mark}\0".encode(), {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state, _, _, own = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            inside = session != 0 and int(own) == session and state != "Z"
            if inside or wanted in (folder / "environ").read_bytes() + b"\0":
                found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return found


def signal_all(pids: Sequence[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def kill_left_behind() -> None:
    """Kill the services of a chaos run that was itself killed before it could end them."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            found = [item for item in (folder / "environ").read_bytes().split(b"\0") if item.startswith(f"{MARK}=".encode())]
            owner = found[0].partition(b"=")[2].partition(b":")[0].decode() if found else ""
            if owner and not Path(f"/proc/{owner}").exists():
                os.kill(int(folder.name), signal.SIGKILL)


@dataclass(slots=True)
class Service:
    """A program that is kept running.

    Parameters
    ----------
    name
        Its name.
    command, environment
        What is started.
    log
        File that its output is added to.
    restart_s
        Seconds after its end at which it is started again.
    always
        Whether exit code 0 counts as an end that needs a new start, as in `Restart=always`; else `Restart=on-failure`.
    user
        Who runs it.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    log: Path
    restart_s: float = 5.0
    always: bool = True
    user: int | None = None
    process: subprocess.Popen[bytes] | None = None
    due_s: float = 0.0
    wanted: bool = False
    ends: list[int] = field(default_factory=list)

    @property
    def mark(self) -> str:
        return f"{os.getpid()}:{self.name}"

    def look(self) -> None:
        """Start the program where it is due; where it ended, end what is left of it and note when to start again."""
        if not self.wanted:
            return
        if self.process is None:
            if time.monotonic() >= self.due_s:
                self.process = self._start()
        elif (code := self.process.poll()) is not None:
            self._end_rest()
            self.ends.append(code)
            self.process, self.due_s = None, time.monotonic() + self.restart_s
            self.wanted = self.always or code != 0

    def find(self, word: str) -> list[int]:
        """Numbers of its processes that have the word in their command line."""
        return sorted(pid for pid, line in processes(self.mark).items() if word in line)

    def stop(self) -> None:
        """Ask the program to end, and end what does not."""
        self.wanted = False
        if self.process is not None:
            with suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGCONT)
                self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_S)
        self._end_rest()
        self.process = None

    def _start(self) -> subprocess.Popen[bytes]:
        who = {} if self.user is None else {"user": self.user, "group": self.user, "extra_groups": []}
        settings = {**self.environment, MARK: self.mark}
        with self.log.open("ab") as out:
            out.write(f"--- {time.strftime('%H:%M:%S')} start of {self.name}\n".encode())
            out.flush()
            return subprocess.Popen(
                self.command,
                env=settings,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                cwd="/",
                **who,
            )

    def _end_rest(self) -> None:
        ends = time.monotonic() + KILL_S
        session = self.process.pid if self.process is not None else 0
        while pids := list(processes(self.mark, session)):
            signal_all(pids, signal.SIGKILL)
            if self.process is not None:
                self.process.poll()
            if time.monotonic() > ends:
                raise TimeoutError(f"{self.name}: processes {pids} do not end")
            time.sleep(0.05)


class Services:
    """All services of a run, looked after by one thread."""

    def __init__(self) -> None:
        self.by_name: dict[str, Service] = {}
        self.lock = threading.RLock()
        self.ended = threading.Event()

    def start(self, service: Service) -> None:
        with self.lock:
            service.wanted, service.due_s = True, 0.0
            self.by_name[service.name] = service
            service.look()

    def stop(self, name: str) -> None:
        with self.lock:
            self.by_name[name].stop()

    def __getitem__(self, name: str) -> Service:
        return self.by_name[name]

    def watch(self) -> None:
        while not self.ended.wait(LOOK_S):
            with self.lock:
                for service in list(self.by_name.values()):
                    service.look()


@contextmanager
def services() -> Iterator[Services]:
    """Services that all end with the block."""
    kept = Services()
    thread = threading.Thread(target=kept.watch, daemon=True)
    thread.start()
    try:
        yield kept
    finally:
        kept.ended.set()
        thread.join(STOP_S)
        for service in reversed(list(kept.by_name.values())):
            service.stop()


def until(true: Callable[[], object], what: str, timeout_s: float) -> None:
    ends = time.monotonic() + timeout_s
    while not true():
        if time.monotonic() > ends:
            raise TimeoutError(f"not within {timeout_s:.0f} s: {what}")
        time.sleep(LOOK_S)

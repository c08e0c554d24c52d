"""Programs that either side keeps running: where they are, what they see of the environment, when they start again."""

from __future__ import annotations

import errno
import gc
import os
import random
import signal
import socket
import sysconfig
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from icmoe.ending import answered

FIRST_DELAY_S, LONGEST_DELAY_S, LONG_LIFE_S = 1.0, 15.0, 120.0
LOOK_S = 0.1
PORTS = range(20_000, 32_000)
"""Below Linux's ports for outgoing connections, 32768 to 60999."""


@dataclass(slots=True)
class Stop:
    """Whether this process has been asked to end.

    No `threading.Event`: Python runs a signal's handler in the main thread wherever that is, so also while it holds the
    event's lock inside `wait`, and `set` would then wait for that lock for ever.

    Parameters
    ----------
    asked
        Set by the signal's handler, never taken back.
    """

    asked: bool = False

    def wait(self, seconds: float) -> bool:
        """Sleep for `seconds`, or `LOOK_S` more than until the process is asked to end; return whether it is."""
        ends = time.monotonic() + seconds
        while not self.asked and (left_s := ends - time.monotonic()) > 0:
            time.sleep(min(left_s, LOOK_S))
        return self.asked


@contextmanager
def asked_to_stop(*signals: signal.Signals) -> Iterator[Stop]:
    """Hear these signals meanwhile, instead of ending by them.

    Yields
    ------
    Stop
        Tells whether one of them came.
    """
    stop = Stop()

    def ask(number: int, frame: FrameType | None) -> None:
        del number, frame
        stop.asked = True

    with answered(signals, ask):
        yield stop


def program(name: str) -> str:
    """Return the absolute path of a program of the environment that this one runs in."""
    return str(Path(sysconfig.get_path("scripts")) / name)


def flower_settings(home: Path, base: Mapping[str, str]) -> dict[str, str]:
    """Return the environment variables that every Flower process gets.

    No telemetry, no look for updates, nothing installed at run time, no proxy in the talk between processes of one machine,
    and two heaps of the C library rather than eight per core, between whose holes a process of many threads grows.

    Parameters
    ----------
    home
        Folder of Flower's own files.
    base
        The environment so far; its exceptions from the proxy stay.
    """
    local = ",".join(filter(None, (base.get("NO_PROXY") or base.get("no_proxy"), "127.0.0.1,localhost")))
    return {
        "FLWR_HOME": str(home.resolve()),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "MALLOC_ARENA_MAX": base.get("MALLOC_ARENA_MAX", "2"),
        "NO_PROXY": local,
        "no_proxy": local,
    }


def flower_environment(home: Path, base: Mapping[str, str]) -> dict[str, str]:
    """Return the whole environment of a Flower process; Flower starts its own programs by bare name, hence the path."""
    path = os.pathsep.join(filter(None, (sysconfig.get_path("scripts"), base.get("PATH"))))
    return {**base, **flower_settings(home, base), "PATH": path}


def sweep_often() -> None:
    """Let Python look for old cyclic garbage more often, in a process that stays.

    It looks at old objects again when a quarter as many are new. Flower with what it imports is 150,000 objects and more to
    begin with, and dead connections gather meanwhile. Here what is imported by now does not count any more.
    """
    gc.collect()
    gc.freeze()
    gc.collect()


def next_delay(last_s: float, life_s: float) -> float:
    """Return the seconds before the next start: twice the last, up to 15; 1 after a life of two minutes."""
    return FIRST_DELAY_S if life_s >= LONG_LIFE_S else min(max(2 * last_s, FIRST_DELAY_S), LONGEST_DELAY_S)


def free_port() -> int:
    """Return a port of the loopback interface that nobody listens on.

    A program binds it seconds later: it is none of those that Linux gives to outgoing connections, one of which could take it.
    """
    for port in (*random.SystemRandom().sample(PORTS, 20), 0):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return int(probe.getsockname()[1])
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE), "127.0.0.1")


@contextmanager
def private_files() -> Iterator[None]:
    """Make what this process and the children that it starts write meanwhile their owner's alone.

    Yields
    ------
    None
    """
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)

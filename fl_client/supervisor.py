"""`fl_client --site NAME`: the hospital's SuperNode, started again whenever it ends, its lines in plain sentences."""

from __future__ import annotations

import logging
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from logging.handlers import RotatingFileHandler
from pathlib import Path

from fl_client.approval import approved_studies
from fl_client.own_lines import TAG, VARIABLE, untagged
from fl_client.readiness import require_ready
from fl_client.screen import Form, Run, Say, screen
from fl_client.site import ENVIRONMENT, SiteFile, read_named
from fl_client.status import LOCK
from fl_client.watchdog import CONNECTION_ENDED
from icmoe.atomic import regular
from icmoe.errors import NOT_STARTED, Fault, IcmoeError, exit_on_fault, printable
from icmoe.locks import claim
from icmoe.processes import asked_to_stop, flower_environment, free_port, next_delay, private_files

KEY_NOT_KNOWN = 3
"""Exit code of the child where the coordinator does not know the site's key."""
SUPEREXEC_GONE = 4
"""Exit code of the child where Flower's SuperExec, without which nothing is trained, has ended."""

GRACE_S = 5.0
LOOK_S = "0.25"
"""Seconds between the looks of Flower's SuperExec for a message to answer, on this machine; by default it waits 1 s."""
LOG = "supernode.log"

# Flower ends without a word when the coordinator answers 401.
_TURNED_AWAY = "the coordinator turned the site away: its clock differs by more than 5 s, or its key was revoked"
_NOT_LET_IN = "the coordinator does not let the site in: its key is not admitted, or its last connection runs out first (60 s)"
_NOTHING_TRAINS = "Flower's SuperExec at this site ended, which starts the training: killed, or short of memory"
_GIVEN_UP = "the connection was given up, for what the line above names"
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_LEVEL = re.compile(r"^[A-Z]+\s*:\s+")
_RUN = re.compile(r"^\[RUN (\d+)")
_SENTENCES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), sentence)
    for pattern, sentence in (
        (r"^SuperNode ID:", "connected; waiting for the coordinator to ask"),
        (r"^Receiving: query", "asked who is here"),
        (r"^Receiving: train", "asked to train a round"),
        (r"^Receiving: evaluate", "asked to score the model"),
        (r"^Sent successfully", "answer sent; waiting for the coordinator to ask"),
        (r"^Connection attempt failed", "the coordinator does not answer; trying again"),
        (r"^Connection successful", "the coordinator answers again"),
        (r"^\[code: 2004\]", str(Fault(number=324, what=_NOT_LET_IN))),
        (r"^\[code: \d+\] (.+?)\.?$", str(Fault(number=324, what="the coordinator refused the connection", value=r"\1"))),
        (r"^SSL/TLS handshake error", str(Fault(number=324, what="the coordinator's certificate is not the consortium's"))),
        (r"^Timeout \(", str(Fault(number=323, what="training was ended at the study's deadline"))),
        (r"is not in `RUNNING` status", "the coordinator ended the run before the answer was sent"),
    )
)


def run_site(path: Path, name: str, form: Form) -> int:
    """Keep the site connected until SIGTERM, SIGINT or SIGHUP and return the exit code.

    Parameters
    ----------
    path
        The site file.
    name
        The site.
    form
        What is shown meanwhile.
    """
    with exit_on_fault():
        settings = read_named(path, name)
        state = path.parent / settings.state
        names = ", ".join(f"{study.name} {study.digest[:12]}" for study in approved_studies(state))
        flags = connection_flags(path, settings)
        run = Run()
        with private_files(), only_one(state), screen(path, settings, form, run) as say:
            say(f"approved: {names}")
            require_ready(path, name, say)
            say(f"connecting to {flags[1]}; Flower's own lines go to {state / LOG}")
            with _log_file(state / LOG) as log:
                supervise(lambda: start_supernode(path, state, flags), Hearing(say, log, run), say)
            say("left the federation")
    return 0


def connection_flags(path: Path, settings: SiteFile) -> list[str]:
    """Return the flags of `flower-supernode` that say where the coordinator is and who the site is.

    Raises
    ------
    IcmoeError
        203 where the site file has no section [coordinator].
    """
    chosen = settings.coordinator
    if chosen is None:
        raise IcmoeError(Fault(number=203, where=str(path), value="[coordinator]", did=NOT_STARTED))
    folder = path.resolve().parent
    ca, key = str(folder / chosen.ca), str(folder / chosen.key)
    return ["--superlink", chosen.address, "--root-certificates", ca, "--auth-supernode-private-key", key]


def child_environment(path: Path, state: Path, base: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of the SuperNode and of what it starts: Flower's, where the site file is, how own lines begin."""
    own = {ENVIRONMENT: str(path.resolve()), VARIABLE: TAG, "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": LOOK_S}
    return {**flower_environment(state / "flower", base), **own}


def start_supernode(path: Path, state: Path, flags: list[str]) -> subprocess.Popen[str]:
    """Start the pinned SuperNode in a process group of its own, its local port free and its own."""
    command = [sys.executable, "-P", "-m", "fl_client.supernode", str(os.getpid()), *flags, "--port", str(free_port())]
    return subprocess.Popen(
        command,
        env=child_environment(path, state, os.environ),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )


def supervise(start: Callable[[], subprocess.Popen[str]], hear: Say, say: Say) -> None:
    """Start the child, start it again after any exit, until this process is asked to stop.

    Parameters
    ----------
    start
        Starts the child as leader of its own process group, its output on a pipe.
    hear
        Takes each line of the child.
    say
        Takes what the supervisor itself says.
    """
    delay_s = 0.0
    with asked_to_stop(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as stop:
        while not stop.asked:
            born = time.monotonic()
            child = start()
            ears = threading.Thread(target=_listen, args=(child, hear), daemon=True)
            ears.start()
            while child.poll() is None and not stop.wait(0.1):
                pass
            end_group(child)
            ears.join(timeout=1.0)
            if stop.wait(0):
                return
            delay_s = next_delay(delay_s, time.monotonic() - born)
            wait_s = delay_s * random.uniform(0.7, 1.3)  # noqa: S311  (spreads the hospitals, hides nothing)
            say(str(_fault_of(child.returncode, f"Starting again in {wait_s:.0f} s.")))
            stop.wait(wait_s)


def _fault_of(exit_code: int, did: str) -> Fault:
    if exit_code == KEY_NOT_KNOWN:
        return Fault(number=333, did=did)
    known = {0: _TURNED_AWAY, SUPEREXEC_GONE: _NOTHING_TRAINS, CONNECTION_ENDED: _GIVEN_UP}
    return Fault(number=324, what=known.get(exit_code, f"the connection ended with exit code {exit_code}"), did=did)


def end_group(child: subprocess.Popen[str]) -> None:
    """End the child and everything it started: asked first, killed after five seconds; at once where the child is gone."""
    deadline = time.monotonic() + (GRACE_S if child.poll() is None else 0.0)
    if child.poll() is None:
        _signal_group(child, signal.SIGTERM)
    while _group_lives(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    _signal_group(child, signal.SIGKILL)
    child.wait(timeout=GRACE_S)


@contextmanager
def only_one(state: Path) -> Iterator[None]:
    """Hold the site's lock: two SuperNodes with one key would push each other out.

    Raises
    ------
    IcmoeError
        325 where another process holds it.
    """
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    with open(state / LOCK, "w", opener=regular) as lock:
        what, todo = "the site is running already", "Stop the other process first."
        claim(lock, Fault(number=325, where=str(state), what=what, did=NOT_STARTED, todo=todo))
        yield


@dataclass(slots=True)
class Hearing:
    """Turns the SuperNode's lines into sentences; all lines go to the log file.

    Parameters
    ----------
    say
        Takes the sentences; one that repeats itself is said once.
    log
        Takes the lines.
    run
        Told of each run that a message belongs to.
    """

    say: Say
    log: Say
    run: Run = field(default_factory=Run)
    last: str = field(default="", init=False)

    def __call__(self, line: str) -> None:
        """Take one line."""
        plain, is_fault = untagged(printable(_LEVEL.sub("", _COLOUR.sub("", line)).strip()))
        self.log(plain)
        if match := _RUN.match(plain):
            self.run.number = match[1]
        sentence = plain if is_fault else sentence_of(plain)
        if sentence and sentence != self.last:
            self.say(sentence)
            self.last = sentence


def sentence_of(line: str) -> str | None:
    """Return what a line of Flower's means to the hospital, None where it means nothing."""
    for pattern, sentence in _SENTENCES:
        if match := pattern.search(line):
            return match.expand(sentence)
    return None


def _listen(child: subprocess.Popen[str], hear: Say) -> None:
    for line in child.stdout or ():
        hear(line)


def _signal_group(child: subprocess.Popen[str], number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(child.pid, number)


def _group_lives(child: subprocess.Popen[str]) -> bool:
    child.poll()
    try:
        os.killpg(child.pid, 0)
    except ProcessLookupError:
        return False
    return True


class _LogFile(RotatingFileHandler):
    """Flower's own lines; one that finds no room is lost, and the site goes on."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Print no traceback."""


@contextmanager
def _log_file(path: Path) -> Iterator[Say]:
    handler = _LogFile(path, maxBytes=5_000_000, backupCount=3)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log = logging.Logger("supernode")  # of its own: nothing else reaches the file, nothing of it the screen
    log.addHandler(handler)
    try:
        yield log.info
    finally:
        with suppress(OSError):  # what it holds yet may find no room either
            handler.close()

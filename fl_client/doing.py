"""What a site is doing at this moment, in small files beside its records: for its own screen, never for the coordinator.

The supervisor imports this module, which therefore loads neither PyTorch nor anything that does.
"""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import IO

from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from icmoe.atomic import read_regular, regular, write_atomically
from icmoe.locks import GLANCE_S, hold, is_locked

FILE, LOCK, SAID = "doing.json", "doing.lock", "said.json"
EVERY_S = 0.5
"""Least seconds between two writes."""

OnStep = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Doing:
    """A round that is being trained.

    Parameters
    ----------
    run
        Flower's number of the run, the same at the coordinator.
    study
        Name.
    round, rounds
        Of the study.
    step, steps
        Of the round; 0 of 0 before the first step.
    memory_bytes
        Largest memory so far: of the GPU where there is one, else of the process.
    device
        Where it trains.
    since
        Seconds since 1970.
    """

    run: str
    study: str
    round: int
    rounds: int
    step: int = 0
    steps: int = 0
    memory_bytes: int = 0
    device: str = "cpu"
    since: float = 0.0


_FORM = TypeAdapter(Doing)


@contextmanager
def telling(state: Path | None, doing: Doing) -> Iterator[OnStep]:
    """Keep the file while inside.

    Parameters
    ----------
    state
        The site's state folder; nothing is written where None.
    doing
        What is begun.

    Yields
    ------
    callable
        To call with steps done and steps in all.
    """
    doing, next_s = replace(doing, since=time.time()), 0.0

    def on_step(step: int, steps: int) -> None:
        nonlocal next_s
        if state is None or time.monotonic() < next_s:
            return
        next_s = time.monotonic() + EVERY_S
        now = replace(doing, step=step, steps=steps, memory_bytes=_memory_bytes(doing.device))
        with suppress(OSError):  # a full disk is found by what must be written
            write_atomically(state / FILE, _FORM.dump_json(now), durable=False, private=True)

    lock = None if state is None else _held(state)
    on_step(0, 0)
    try:
        yield on_step
    finally:
        if lock is not None:
            lock.close()
        if state is not None:
            with suppress(OSError):
                (state / FILE).unlink(missing_ok=True)


def _held(state: Path) -> IO[bytes] | None:
    """Return the lock by which a reader knows that the training lives: one that is killed leaves its file behind."""
    try:
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.fdopen(regular(state / LOCK, os.O_WRONLY | os.O_CREAT), "wb")
    except OSError:
        return None
    with suppress(OSError):  # a training that is being ended beside it may hold it still
        hold(lock, name=state / LOCK, deadline_s=GLANCE_S)
    return lock


def doing_now(state: Path) -> Doing | None:
    """Return what the file says, None where there is none, it cannot be read, or who wrote it was killed."""
    if not is_locked(state / LOCK):
        return None
    try:
        return _FORM.validate_json(read_regular(state / FILE))
    except (OSError, ValidationError):
        return None


def note_said(state: Path, sentence: str, run: str | None) -> None:
    """Keep what the supervisor said last, for `fl_client status`; a disk that is full is no reason to leave."""
    record = {"says": sentence, "run": run, "since": time.time()}
    with suppress(OSError):
        write_atomically(state / SAID, json.dumps(record).encode(), durable=False, private=True)


def _memory_bytes(device: str) -> int:
    if device.startswith("cuda"):
        import torch  # the supervisor, which keeps what it said here, does without

        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

"""A chain of entries (`icmoe.chain`) in a file of JSON lines, to which lines are only ever added."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from icmoe.atomic import read_regular, regular
from icmoe.chain import Entry, first_broken
from icmoe.errors import Fault, IcmoeError
from icmoe.locks import hold

Broken = Callable[[int], Fault]
"""Returns what to say of the line of a number, from 1, that is damaged or was changed."""


def add_line(path: Path, following: Callable[[Sequence[bytes]], Entry]) -> Entry:
    """Add one entry and wait until it is on the disk; no other process adds one meanwhile.

    A line that a crash left unfinished at the end is cut off first: what it spoke of had not happened yet. So is one that did
    not come onto the disk, a full one for example.

    Parameters
    ----------
    path
        The file, for its owner alone; made with its folder where absent.
    following
        Returns the entry that follows the whole lines of the file; nothing is written where it raises.

    Raises
    ------
    OSError
        Where the disk refuses it, or another process holds the file for longer than `icmoe.locks.LOCK_S`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = regular(path, os.O_RDWR | os.O_CREAT, 0o600)
    with os.fdopen(descriptor, "r+b", buffering=0) as file:  # a buffer would write the line again when it is closed
        hold(file, name=path)
        whole = _whole(file.read())
        entry = following(whole.splitlines())
        file.truncate(len(whole))
        try:
            _put(descriptor, json.dumps(entry).encode() + b"\n", len(whole))
        except OSError as error:
            file.truncate(len(whole))
            error.filename = str(path)
            raise
    return entry


def read_chain(path: Path, broken: Broken, *, apart: Collection[str] = ()) -> list[Entry]:
    """Return all entries after checking the chain; empty where there is no file yet.

    Parameters
    ----------
    path
        The file.
    broken
        Says what is wrong.
    apart
        As in `icmoe.chain.digest_of`.

    Raises
    ------
    IcmoeError
        The fault of the first line that does not fit.
    """
    lines = _whole(read_regular(path)).splitlines() if os.path.lexists(path) else []  # a link to nothing is no new log
    entries = [parsed(line, number, broken) for number, line in enumerate(lines, start=1)]
    if number := first_broken(entries, apart=apart):
        raise IcmoeError(broken(number))
    return entries


def parsed(line: bytes, number: int, broken: Broken) -> Entry:
    """Return the entry of a line; its place in the chain is not looked at.

    Raises
    ------
    IcmoeError
        Its fault where it cannot be read.
    """
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        raise IcmoeError(broken(number)) from None
    if not isinstance(entry, dict) or not {"line", "event", "previous", "hash"} <= set(entry):
        raise IcmoeError(broken(number))
    if json.dumps(entry).encode() != line:  # a space changed into a tab would mean the same, and still be a change
        raise IcmoeError(broken(number))
    return entry


def _put(descriptor: int, line: bytes, at: int) -> None:
    """Write a line at a place of a file and wait until it is on the disk."""
    while line:
        written = os.pwrite(descriptor, line, at)
        line, at = line[written:], at + written
    os.fsync(descriptor)


def _whole(content: bytes) -> bytes:
    """Return the lines that were finished."""
    return content[: content.rfind(b"\n") + 1]

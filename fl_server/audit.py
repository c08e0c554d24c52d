"""The coordinator's audit log of a study: what was refused, who sits out, who was let in again; lines are only ever added.

A line changed, moved or taken out later shows (`icmoe.chain`). Lines cut off at the end show beside a copy of the head that
was noted elsewhere; `fl_server status --json` prints it.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from icmoe.chain import START, Entry, first_broken, linked
from icmoe.errors import Fault, IcmoeError


def note(path: Path, event: str, values: Mapping[str, Any]) -> Entry:
    """Add one line and wait until it is on the disk; a line that a crash left unfinished is cut off first.

    Raises
    ------
    IcmoeError
        516 where the last line cannot be read.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    with os.fdopen(descriptor, "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        lines = whole.splitlines()
        last = _parsed(lines[-1], path, len(lines)) if lines else None
        entry = linked({"time": datetime.now(UTC).isoformat(), "event": event, **values}, last)
        file.truncate(len(whole))
        file.seek(len(whole))
        file.write(json.dumps(entry).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    return entry


def read(path: Path) -> list[Entry]:
    """Return all lines after checking the chain; empty where there is no log yet.

    Raises
    ------
    IcmoeError
        516 with the first line that does not fit.
    """
    content = path.read_bytes() if path.exists() else b""
    lines = content[: content.rfind(b"\n") + 1].splitlines()
    entries = [_parsed(line, path, number) for number, line in enumerate(lines, start=1)]
    if broken := first_broken(entries):
        raise IcmoeError(_broken(path, broken))
    return entries


def head(path: Path) -> str:
    """Return "count:digest" of the last line, to be noted elsewhere; "0:" and zeros for an empty log."""
    entries = read(path)
    return f"{len(entries)}:{entries[-1]['hash'] if entries else START}"


def _parsed(line: bytes, path: Path, number: int) -> Entry:
    try:
        entry = json.loads(line)
    except ValueError:
        raise IcmoeError(_broken(path, number)) from None
    if not isinstance(entry, dict) or not {"line", "hash"} <= set(entry):
        raise IcmoeError(_broken(path, number))
    return entry


def _broken(path: Path, number: int) -> Fault:
    return Fault(number=516, where=path.name, value=f"line {number}", did="Nothing was added to it.")

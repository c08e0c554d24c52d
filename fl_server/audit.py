"""The coordinator's audit log of a study: what was refused, who sits out, who was let in again; lines are only ever added.

A line changed, moved or taken out later shows (`icmoe.chain`). Lines cut off at the end show beside a copy of the head that
was noted elsewhere; `fl_server status --json` prints it.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from icmoe.chain import START, Entry, linked
from icmoe.chain_file import add_line, parsed, read_chain
from icmoe.errors import Fault


def note(path: Path, event: str, values: Mapping[str, Any]) -> Entry:
    """Add one line and wait until it is on the disk.

    Raises
    ------
    IcmoeError
        516 where the last line cannot be read.
    """
    said = {"time": datetime.now(UTC).isoformat(), "event": event, **values}
    return add_line(path, lambda lines: linked(said, parsed(lines[-1], len(lines), partial(_broken, path)) if lines else None))


def read(path: Path) -> list[Entry]:
    """Return all lines after checking the chain; empty where there is no log yet.

    Raises
    ------
    IcmoeError
        516 with the first line that does not fit.
    """
    return read_chain(path, partial(_broken, path))


def head(path: Path) -> str:
    """Return "count:digest" of the last line, to be noted elsewhere; "0:" and zeros for an empty log."""
    entries = read(path)
    return f"{len(entries)}:{entries[-1]['hash'] if entries else START}"


def _broken(path: Path, number: int) -> Fault:
    return Fault(number=516, where=path.name, value=f"line {number}", did="Nothing was added to it.")

"""The site's audit log: what was approved, what came in, what left. Lines are only ever added, each holds the last one's hash.

A line changed, moved or taken out later shows. Taking lines off the end does not: compare the last line's hash, which
`fl_client audit` prints, with one noted elsewhere.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from icmoe.errors import Fault, IcmoeError

LOG = "audit.jsonl"
START = "0" * 64

Entry = dict[str, Any]


def record(state: Path, event: str, values: Mapping[str, Any]) -> Entry:
    """Add one line to the audit log of a state folder and wait until it is on the disk.

    A line that a crash left unfinished at the end is cut off first: what it spoke of had not happened yet.

    Parameters
    ----------
    state
        Folder; made where absent.
    event
        What happened: approved, withdrawn, received or sent.
    values
        Plain values; never a patient's.

    Raises
    ------
    IcmoeError
        321 where the last line cannot be read.
    """
    state.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(state / LOG, os.O_RDWR | os.O_CREAT, 0o600)
    with os.fdopen(descriptor, "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        lines = whole.splitlines()
        last: Entry = _parsed(lines[-1], state, len(lines)) if lines else {"line": 0, "hash": START}
        now = datetime.now(UTC).isoformat()
        entry = {"line": last["line"] + 1, "time": now, "event": event, **values, "previous": last["hash"]}
        entry["hash"] = _hash(entry)
        file.truncate(len(whole))
        file.seek(len(whole))
        file.write(json.dumps(entry).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    return entry


def read_log(state: Path) -> list[Entry]:
    """Return all lines of the audit log after checking the chain of hashes; empty where there is no log yet.

    Raises
    ------
    IcmoeError
        321 with the first line that does not fit.
    """
    path = state / LOG
    content = path.read_bytes() if path.exists() else b""
    entries: list[Entry] = []
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), start=1):
        entry = _parsed(line, state, number)
        previous = entries[-1]["hash"] if entries else START
        if (entry["line"], entry["previous"], entry["hash"]) != (number, previous, _hash(entry)):
            raise IcmoeError(_broken(state, number))
        entries.append(entry)
    return entries


def digests_of_round(entries: list[Entry], round_number: int, study: str | None = None) -> list[Entry]:
    """Return the lines on the global model received and the update sent in a round of training, in order.

    Parameters
    ----------
    entries
        From `read_log`.
    round_number
        The round.
    study
        Name of the study, or digest or its beginning; the last one trained where absent.

    Raises
    ------
    IcmoeError
        210 where the log holds no such round.
    """
    rows = [entry for entry in entries if entry["event"] in {"received", "sent"} and entry.get("kind") == "train"]
    wanted = study or (rows[-1]["study"] if rows else "")
    named = [row for row in rows if row["name"] == wanted or row["study"].startswith(wanted)]
    found = [row for row in named if row["round"] == round_number]
    if not found:
        limit = ", ".join(sorted({str(row["round"]) for row in named}, key=int)) or "none"
        raise IcmoeError(Fault(number=210, where="audit", what="round is not in the log", value=str(round_number), limit=limit))
    return found


def _parsed(line: bytes, state: Path, number: int) -> Entry:
    try:
        entry = json.loads(line)
    except ValueError:
        raise IcmoeError(_broken(state, number)) from None
    if not isinstance(entry, dict) or not {"line", "event", "previous", "hash"} <= set(entry):
        raise IcmoeError(_broken(state, number))
    return entry


def _broken(state: Path, number: int) -> Fault:
    return Fault(number=321, where=str(state / LOG), what="audit log was changed or is damaged", value=f"line {number}")


def _hash(entry: Entry) -> str:
    values = {key: value for key, value in entry.items() if key != "hash"}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

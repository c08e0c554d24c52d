"""The site's audit log: what was approved, what came in, what was spent, what left. Lines are only ever added.

Each line holds the last one's hash and is signed by the site's key, where the site has one; lines of version 1 were not.
A line changed, moved or taken out later shows in the chain. Lines taken off the end show against the ledger, which keeps
count and hash of the last line, and against what the coordinator was sent (`fl_client/records.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fl_client.signing import Signer, fingerprint_of, signature_holds
from icmoe.chain import Entry, digest_of, placed
from icmoe.chain_file import add_line, parsed, read_chain
from icmoe.errors import NOTHING_SENT, Fault, IcmoeError
from icmoe.messages import DICE_KEY, LOSS_KEY, PATIENTS_KEY, SECONDS_KEY, STEPS_KEY
from icmoe.receipts import EMPTY, Head

LOG = "audit.jsonl"
VERSION = 2
_SIGNED_AFTER = ("signature",)
"""What is of a line's hash, and so no part of it."""


class _Numbers(BaseModel):
    """What a round's answer told, as far as a hospital is shown it again."""

    model_config = ConfigDict(strict=True, extra="allow")

    val_dice: float | None = Field(default=None, alias=DICE_KEY)
    patients: int | None = Field(default=None, alias=PATIENTS_KEY)
    loss: float | None = Field(default=None, alias=LOSS_KEY)
    steps: int | None = Field(default=None, alias=STEPS_KEY)
    seconds: float | None = Field(default=None, alias=SECONDS_KEY)


class _Line(BaseModel):
    """What every reader of the log counts on; whoever forges a line can give it the right place in the chain."""

    model_config = ConfigDict(strict=True, extra="allow")

    line: int
    time: str
    event: str
    kind: str | None = None
    study: str | None = None
    name: str | None = None
    run: str | None = None
    round: int | None = None
    digest: str | None = None
    number: int | None = None
    numbers: _Numbers | None = None
    entry: Annotated[int, Field(ge=1)] | None = None
    entry_hash: str | None = None
    previous: str
    hash: str

    @model_validator(mode="after")
    def _whole(self) -> _Line:
        needed: tuple[object, ...] = (self.entry, self.entry_hash) if self.event == "spent" else ()
        needed += (self.study,) if self.event in {"approved", "withdrawn"} else ()
        needed += (self.study, self.name, self.round) if self.kind == "train" else ()
        if None in needed:
            raise ValueError("a part of the line is missing")
        return self


@dataclass(frozen=True, slots=True)
class Signatures:
    """What the signatures of an audit log say.

    Parameters
    ----------
    unsigned
        Lines before the first signed one.
    keys
        (first line, public key in OpenSSH format) of each key in turn.
    """

    unsigned: int
    keys: tuple[tuple[int, str], ...]

    def sentence(self) -> str:
        """Return from which line on which key signed."""
        if not self.keys:
            return f"none of {self.unsigned} lines is signed"
        return "signed " + ", ".join(f"from line {first} on by {fingerprint_of(key)}" for first, key in self.keys)


def record(state: Path, event: str, values: Mapping[str, Any], *, signer: Signer | None = None, known: Head = EMPTY) -> Entry:
    """Add one line to the audit log of a state folder and wait until it is on the disk.

    Parameters
    ----------
    state
        Folder; made where absent.
    event
        What happened: approved, withdrawn, received, spent, sent or declined.
    values
        Plain values; never a patient's.
    signer
        The site's key; the line is not signed where absent.
    known
        A line that the log must hold: the last one that the ledger knows.

    Raises
    ------
    IcmoeError
        321 where the last line cannot be read or the known one is not there; 205, 306 or 307 where the key cannot be used.
    """

    def following(lines: Sequence[bytes]) -> Entry:
        there = 0 < known.count <= len(lines)
        require_line(state, known, len(lines), _parsed(lines[known.count - 1], state, known.count) if there else None)
        return _next_line(_parsed(lines[-1], state, len(lines)) if lines else None, event, values, signer)

    return add_line(state / LOG, following)


def require_line(state: Path, known: Head, count: int, found: Entry | None, by: str = "the ledger") -> None:
    """Refuse a log that lacks a line that is known to have been in it.

    Parameters
    ----------
    state
        The site's state folder.
    known
        Number and hash of the line.
    count
        Lines in the log.
    found
        The line of that number, None where the log is shorter.
    by
        Who knows it.

    Raises
    ------
    IcmoeError
        321 where the line is not there, or is another.
    """
    if count < known.count:
        what = "lines are missing at the end of the audit log"
        value, limit = f"{count} lines", f"at least {known.count}, as {by} says"
        raise IcmoeError(Fault(number=321, where=str(state / LOG), what=what, value=value, limit=limit, did=NOTHING_SENT))
    if found is not None and found["hash"] != known.digest:
        raise IcmoeError(_broken(state, known.count))


def read_log(state: Path) -> list[Entry]:
    """Return all lines of the audit log after checking the chain of hashes; empty where there is no log yet.

    Raises
    ------
    IcmoeError
        321 with the first line that does not fit.
    """
    entries = read_chain(state / LOG, partial(_broken, state), apart=_SIGNED_AFTER)
    for number, entry in enumerate(entries, start=1):
        _require_form(entry, state, number)
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


def check_signatures(state: Path, entries: list[Entry]) -> Signatures:
    """Check every signature of a log whose chain was checked, and return from which line on which key signed.

    Raises
    ------
    IcmoeError
        321 with the first line whose signature does not hold or is missing.
    """
    keys: list[tuple[int, str]] = []
    for entry in entries:
        if "key" in entry:
            keys.append((entry["line"], str(entry["key"])))
        if keys and not signature_holds(keys[-1][1], entry["hash"], entry.get("signature")):
            raise IcmoeError(_broken(state, entry["line"], "signature in the audit log does not hold"))
    return Signatures(keys[0][0] - 1 if keys else len(entries), tuple(keys))


def _next_line(last: Entry | None, event: str, values: Mapping[str, Any], signer: Signer | None) -> Entry:
    """Return the line after `last`; a line names the key that signs it where the line before was signed by another."""
    entry = placed({"version": VERSION, "time": datetime.now(UTC).isoformat(), "event": event, **values}, last)
    signed_by = None if last is None else last.get("by")
    if signer is None:
        if signed_by is not None:
            todo = "Name the key in the site file again, under [coordinator]."
            raise IcmoeError(Fault(number=321, where="audit", what="the audit log is signed, this line would not be", todo=todo))
        return {**entry, "hash": digest_of(entry)}
    public = signer.public()
    entry |= {"by": fingerprint_of(public)}
    if signed_by != entry["by"]:
        entry |= {"key": public}
    entry["hash"] = digest_of(entry)
    return {**entry, "signature": signer.sign(entry["hash"])}


def _parsed(line: bytes, state: Path, number: int) -> Entry:
    entry = parsed(line, number, partial(_broken, state))
    _require_form(entry, state, number)
    return entry


def _require_form(entry: Entry, state: Path, number: int) -> None:
    try:
        _Line.model_validate(entry)
    except ValidationError:
        raise IcmoeError(_broken(state, number)) from None


def _broken(state: Path, number: int, what: str = "audit log was changed or is damaged") -> Fault:
    return Fault(number=321, where=str(state / LOG), what=what, value=f"line {number}", did=NOTHING_SENT)

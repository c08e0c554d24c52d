"""A chain of entries: each holds the digest of the one before, so that none can be changed, moved or taken out unseen."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

START = "0" * 64

Entry = dict[str, Any]


def digest_of(entry: Mapping[str, Any], *, apart: Collection[str] = ()) -> str:
    """Return the SHA-256 over everything in an entry but its own "hash" and the keys `apart`, such as a signature of it."""
    values = {key: value for key, value in entry.items() if key != "hash" and key not in apart}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def placed(values: Mapping[str, Any], last: Mapping[str, Any] | None) -> Entry:
    """Return the entry that follows `last`, the first where there is none, still without its hash."""
    return {"line": 1 if last is None else last["line"] + 1, **values, "previous": START if last is None else last["hash"]}


def linked(values: Mapping[str, Any], last: Mapping[str, Any] | None) -> Entry:
    """Return the entry that follows `last`, the first where there is none."""
    entry = placed(values, last)
    return {**entry, "hash": digest_of(entry)}


def first_broken(entries: Iterable[Mapping[str, Any]], *, apart: Collection[str] = ()) -> int | None:
    """Return the number, from 1, of the first entry that does not follow from the ones before it; None where all do."""
    previous = START
    for number, entry in enumerate(entries, start=1):
        if (entry.get("line"), entry.get("previous"), entry.get("hash")) != (number, previous, digest_of(entry, apart=apart)):
            return number
        previous = entry["hash"]
    return None

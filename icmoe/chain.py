"""A chain of entries: each holds the digest of the one before, so that none can be changed, moved or taken out unseen."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

START = "0" * 64

Entry = dict[str, Any]


def digest_of(entry: Mapping[str, Any]) -> str:
    """Return the SHA-256 over everything in an entry but its own "hash"."""
    values = {key: value for key, value in entry.items() if key != "hash"}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def linked(values: Mapping[str, Any], last: Mapping[str, Any] | None) -> Entry:
    """Return the entry that follows `last`, the first where there is none."""
    entry = {"line": 1 if last is None else last["line"] + 1, **values, "previous": START if last is None else last["hash"]}
    return {**entry, "hash": digest_of(entry)}


def first_broken(entries: Iterable[Mapping[str, Any]]) -> int | None:
    """Return the number, from 1, of the first entry that does not follow from the ones before it; None where all do."""
    previous = START
    for number, entry in enumerate(entries, start=1):
        if (entry.get("line"), entry.get("previous"), entry.get("hash")) != (number, previous, digest_of(entry)):
            return number
        previous = entry["hash"]
    return None

"""Faults as the page tells them: number, title and the coordinator's own measurements, never what a site wrote.

A refused update may quote what came with it, and a site's software decides what that is. Such values stay in the audit log.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from pydantic import ValidationError

from fl_server.dashboard.snapshot import Told
from fl_server.submit import StudyFolder
from icmoe.errors import CATALOGUE, Fault

# Numbers whose value is a file, a count or a norm of the coordinator's own; of all others the value is left out.
OWN_VALUES = frozenset({*range(201, 206), 403, 420, 421, *range(501, 504), 506, *range(511, 518), 523})
REFUSALS = frozenset({504, 511, 512, 513})


def told(fault: Fault, *, number: int | None = None) -> Told:
    """Return a fault for the page, of round `number` where it is of one."""
    entry = CATALOGUE[fault.number]
    return Told(
        number=fault.number,
        title=fault.what or entry.title,
        remedy=fault.todo or entry.remedy,
        site=fault.where,
        value=fault.value if fault.number in OWN_VALUES else "",
        limit=fault.limit,
        round=number,
    )


def stopping(folder: StudyFolder) -> list[Told]:
    """Return what stopped the last run, where it could say."""
    try:
        return [told(fault) for fault in folder.faults()]
    except (TypeError, KeyError, AttributeError, ValidationError):
        did = "What stopped the last run is not known here."
        return [told(Fault(number=523, where="study.faults.json", did=did))]


def refused_rows(entries: Iterable[Mapping[str, Any]], history: Iterable[Mapping[str, Any]]) -> list[Told]:
    """Return the refusals of an audit log, the newest first, with value and limit where the round was committed.

    Parameters
    ----------
    entries
        Checked lines of the log.
    history
        Records of the committed rounds.
    """
    known = {
        (record["round"], fault["where"], fault["number"]): fault
        for record in history
        for fault in record["faults"]
        if fault["number"] in REFUSALS
    }
    rows = []
    for entry in entries:
        if entry["event"] == "refused" and entry.get("number") in REFUSALS:
            number, site = int(entry["round"]), str(entry["site"])
            fault = known.get((number, site, entry["number"]), {})
            texts = {key: str(fault.get(key, "")) for key in ("what", "value", "limit")}
            row = told(Fault(number=entry["number"], where=site, **texts), number=number)
            rows.append(row.model_copy(update={"time": datetime.fromisoformat(entry["time"])}))
    return rows[::-1]

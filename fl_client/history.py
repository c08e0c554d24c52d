"""The rounds of a site as its audit log tells them: what was asked, learned, sent, and declined."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fl_client.audit import read_log
from fl_client.site import read_named, records_of
from icmoe.chain import Entry
from icmoe.messages import DICE_KEY, LOSS_KEY, PATIENTS_KEY, SECONDS_KEY, STEPS_KEY

Row = dict[str, Any]
_NUMBERS = {"val_dice": DICE_KEY, "loss": LOSS_KEY, "steps": STEPS_KEY, "seconds": SECONDS_KEY}


def rounds_of(lines: Sequence[Entry]) -> list[Row]:
    """Return one row per attempt at a round of training, in order.

    Parameters
    ----------
    lines
        Of the audit log, checked.

    Returns
    -------
    list
        time, study, digest, run, round, outcome ("asked", "sent", "declined", "held back"), number of the refusal, and
        val_dice, loss, steps and seconds where they were sent; what was not is None. `val_dice` is of the model that came in,
        and None too where the site has no validation patient.
    """
    rows: list[Row] = []
    for line in lines:
        if line.get("kind") != "train":
            continue
        if line["event"] == "received" or not rows or not _same(rows[-1], line):
            rows.append(_row(line))
        if line["event"] in {"sent", "declined", "held back"}:
            numbers = line.get("numbers") or {}
            rows[-1] |= {"outcome": line["event"], "number": line.get("number"), "ended": line["time"]}
            rows[-1] |= {name: numbers.get(key) for name, key in _NUMBERS.items()}
            if numbers.get(PATIENTS_KEY) == 0:  # what was sent then is a zero that nobody scored
                rows[-1]["val_dice"] = None
    return rows


def show_history(path: Path, name: str, *, as_json: bool) -> None:
    """Print the rounds of a site as a table or as JSON, then what the ledger knows better.

    Raises
    ------
    IcmoeError
        As `read_named`, `read_log` and `Records.agreement`.
    """
    records = records_of(path, read_named(path, name))
    rows = rounds_of(read_log(records.state))
    if as_json:
        sys.stdout.write(json.dumps(rows, indent=1) + "\n")
    else:
        Console().print(_table(rows, name))
    records.agreement()  # lines cut off at the end show against the ledger alone


def _table(rows: Sequence[Row], name: str) -> Table:
    table = Table(
        title=f"Rounds of {name}; --json has the run's number too", title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0)
    )
    for title in ("time (UTC)", "study", "round", "outcome", "val Dice", "loss", "steps", "s"):
        table.add_column(title, overflow="fold", no_wrap=title not in {"study", "outcome"})
    for row in rows:
        table.add_row(row["time"][5:16].replace("T", " "), escape(row["study"]), *map(escape, cells(row)[2:]))
    return table


def cells(row: Row) -> list[str]:
    """Return time, run, round, outcome, Dice, loss, steps and seconds as texts; "-" where nothing was sent."""
    outcome = row["outcome"] + (f" ICM{row['number']}" if row["number"] else "")
    texts = [row["time"][:19].replace("T", " "), row["run"] or "-", str(row["round"]), outcome]
    forms = {"val_dice": ".4f", "loss": ".4f", "steps": "d", "seconds": ".1f"}
    return texts + ["-" if row[key] is None else format(row[key], form) for key, form in forms.items()]


def _row(line: Entry) -> Row:
    about = {"time": line["time"], "study": line["name"], "digest": line["study"], "run": line.get("run")}
    return {**about, "round": line["round"], "outcome": "asked", "number": None, "ended": None, **dict.fromkeys(_NUMBERS)}


def _same(row: Row, line: Entry) -> bool:
    return row["ended"] is None and (row["digest"], row["round"]) == (line["study"], line["round"])

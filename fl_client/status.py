"""`fl_client status`: where a site stands, from its own records; nothing is asked of the coordinator."""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fl_client.accounts import account_of
from fl_client.approval import read_approvals, standing
from fl_client.audit import LOG
from fl_client.doing import SAID, doing_now
from fl_client.history import rounds_of
from fl_client.ledger import FILE as LEDGER
from fl_client.site import SiteFile, read_named, records_of
from icmoe.atomic import read_regular
from icmoe.locks import is_locked

MINUTE_S = 60

Status = dict[str, Any]

LOCK = "supervisor.lock"
"""Held in the state folder while the site runs."""


def status_of(path: Path, settings: SiteFile) -> Status:
    """Return where the site stands, as plain values.

    Parameters
    ----------
    path
        The site file.
    settings
        What it says.

    Returns
    -------
    dict
        site, running, connection ("says", "since", "run"; None where the site never took part), studies approved, doing
        (round and step, None between rounds), last_round and last_release as in `rounds_of`, epsilon_spent, epsilon_left.

    Raises
    ------
    IcmoeError
        As `Records.agreement` and `read_approvals`.
    """
    state = path.parent / settings.state
    book, lines = records_of(path, settings).agreement()
    account, rounds = account_of(settings, book), rounds_of(lines)
    running, doing = is_locked(state / LOCK), doing_now(state)
    return {
        "site": settings.name,
        "running": running,
        "connection": _connection(state),
        "studies": [approval.study.name for approval in standing(read_approvals(state))],
        "doing": asdict(doing) if doing is not None and running else None,
        "last_round": rounds[-1] if rounds else None,
        "last_release": next((row for row in reversed(rounds) if row["outcome"] == "sent"), None),
        "epsilon_spent": account["epsilon_spent"],
        "epsilon_left": account["epsilon_left"],
    }


def stamp_of(state: Path) -> tuple[int, ...]:
    """Return what changes when the records do, without reading them."""
    found = [state / name for name in (LOG, LEDGER, SAID)]
    return tuple(path.stat().st_mtime_ns if path.exists() else 0 for path in found)


def show_status(path: Path, name: str, *, as_json: bool) -> None:
    """Print where the site stands, as a table or as JSON.

    Raises
    ------
    IcmoeError
        As `read_named` and `status_of`.
    """
    status = status_of(path, read_named(path, name))
    if as_json:
        sys.stdout.write(json.dumps(status, indent=1) + "\n")
        return
    Console(highlight=False).print(table_of(status))


def table_of(status: Status) -> Table:
    """Return a status as a table of two columns."""
    table = Table(title=f"Site {status['site']}", title_justify="left", show_header=False)
    for key, value in _lines(status).items():
        table.add_row(key, Text(value))  # it may quote what stands in a file
    return table


def _lines(status: Status) -> dict[str, str]:
    connection, doing = status["connection"], status["doing"]
    said = f"{connection['says']} ({ago(connection['since'])})" if connection else "has not taken part yet"
    last, sent = status["last_round"], status["last_release"]
    dice = "-" if sent is None or sent["val_dice"] is None else f"{sent['val_dice']:.4f} before round {sent['round']}"
    spent = "no budget in the site file"
    if status["epsilon_spent"] is not None:
        spent = f"epsilon {status['epsilon_spent']:.3f} spent, {status['epsilon_left']:.3f} left"
    return {
        "connection": said if status["running"] else f"not running; last: {said}",
        "studies": ", ".join(status["studies"]) or "none approved",
        "now": now_line(doing) if doing else "no round",
        "last round": "-" if last is None else f"{last['study']}, round {last['round']}: {outcome_of(last)}",
        "validation Dice": dice,
        "last release": "-" if sent is None else f"{sent['study']}, round {sent['round']}, {sent['ended'][:19]} UTC",
        "privacy": spent,
    }


def now_line(doing: Status) -> str:
    """Return a round that is being trained in one line."""
    steps = f", step {doing['step']} of {doing['steps']}" if doing["steps"] else ""
    memory = f", {doing['memory_bytes'] / 2**20:,.0f} MiB at most on {doing['device']}"
    return f"{doing['study']}, round {doing['round']} of {doing['rounds']}{steps}{memory}, begun {ago(doing['since'])}"


def outcome_of(row: Status) -> str:
    """Return how a round ended, with the number where it was declined."""
    return str(row["outcome"]) + (f" (ICM{row['number']})" if row["number"] else "")


def ago(since: float) -> str:
    """Return how long a moment lies back; one that is still to come was noted before the clock was set back."""
    behind = round(time.time() - since)
    seconds, when = abs(behind), "ago" if behind > -MINUTE_S else "ahead of this clock"
    for unit, size in (("d", 86400), ("h", 3600), ("min", MINUTE_S)):
        if seconds >= size:
            return f"{seconds // size} {unit} {when}"
    return f"{max(0, behind)} s ago"


def _connection(state: Path) -> Status | None:
    try:
        found = json.loads(read_regular(state / SAID))
        since = float(found["since"])
        return {"says": str(found["says"]), "since": since, "run": found["run"]} if math.isfinite(since) else None
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None

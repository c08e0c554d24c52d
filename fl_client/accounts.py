"""What `fl_client ledger` and `fl_client audit verify` print, and the page for the data protection officer."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fl_client.budget import Budget, epsilon_of_history, history_of
from fl_client.ledger import Book, Entry
from fl_client.pages import rendered
from fl_client.site import SiteFile, read_named, records_of
from icmoe.atomic import write_atomically
from icmoe.errors import print_faults
from icmoe.private import file_errors

Account = dict[str, Any]


def account_of(settings: SiteFile, book: Book) -> Account:
    """Return what a ledger amounts to, as plain values: the budget, what is spent and left, one row per study.

    Without a budget nothing is composed: epsilon needs a delta. Rounds without differential privacy have no epsilon and are
    counted by themselves; where there are any, no promise covers the patients who took part in them.
    """
    budget = settings.budget
    spent = epsilon_of_history(budget, history_of(book.entries)) if budget else None
    return {
        "site": settings.name,
        "budget": budget.model_dump() if budget else None,
        "epsilon_spent": spent,
        "epsilon_left": max(0.0, budget.epsilon - spent) if budget and spent is not None else None,
        "unit": "patient",
        "adjacency": "add or remove one patient",
        "entries": book.head.count,
        "head": book.head.digest,
        "rounds_without_privacy": sum(entry.releases is None for entry in book.entries),
        "studies": _studies(budget, book.entries),
    }


def show_ledger(path: Path, name: str, *, page: Path | None, as_json: bool) -> None:
    """Print a site's ledger, as a table or as JSON, and write the page where one is asked for.

    Raises
    ------
    IcmoeError
        As `Records.agreement`: a ledger that does not agree with the audit log is not shown as if it did.
    """
    settings = read_named(path, name)
    book, lines = records_of(path, settings).agreement()
    account = account_of(settings, book)
    if page is not None:
        with file_errors():
            write_atomically(page, page_of(account, book, len(lines)).encode(), private=True)
    if as_json:
        sys.stdout.write(json.dumps(account, indent=1) + "\n")
        return
    console = Console(highlight=False)
    console.print(_table(account))
    for sentence in sentences_of(account):
        console.print(sentence, soft_wrap=True, markup=False)
    if page is not None:
        console.print(f"Page for the data protection officer: {page}", soft_wrap=True, markup=False)


def verify_records(path: Path, name: str, *, as_json: bool) -> None:
    """Check the audit log against itself, its signatures and the ledger, say what was found, and exit with 1 on a fault.

    Raises
    ------
    IcmoeError
        As `Records.verify`.
    """
    records = records_of(path, read_named(path, name))
    book, lines, signatures = records.verify()
    last = lines[-1]["hash"] if lines else "none"
    fault = records.foreign_key(signatures)
    if as_json:
        found = {"lines": len(lines), "unsigned": signatures.unsigned, "keys": signatures.keys, "last": last}
        about = {"ledger_entries": book.head.count, "ledger_head": book.head.digest, "fault": fault.record() if fault else None}
        sys.stdout.write(json.dumps({**found, **about}, indent=1) + "\n")
    else:
        console = Console(highlight=False, soft_wrap=True)
        console.print(f"{len(lines)} lines, unbroken, {signatures.sentence()}; hash of the last: {last}")
        console.print(f"{book.head.count} entries in the ledger, unbroken, in agreement with the log; head: {book.head.digest}")
    if fault is not None:
        print_faults([fault])
        sys.exit(1)


def sentences_of(account: Account) -> list[str]:
    """Return what the account says in all, in sentences."""
    budget, sentences = account["budget"], []
    if budget is None:
        sentences.append("No [budget] in the site file: no study with differential privacy is trained here.")
    else:
        by = f"delta {budget['delta']:g}, unit: patient, add or remove one, accountant {budget['accountant']}"
        spent, left = account["epsilon_spent"], account["epsilon_left"]
        sentences.append(f"epsilon {spent:.3f} of {budget['epsilon']:g} is spent, {left:.3f} is left ({by}).")
    if account["rounds_without_privacy"]:
        count = account["rounds_without_privacy"]
        sentences.append(f"{count} attempts at a round were made without differential privacy: no epsilon covers them.")
    return sentences


def page_of(account: Account, book: Book, lines: int) -> str:
    """Return the page for the data protection officer as HTML that stands by itself."""
    budget = account["budget"]
    return rendered(
        "ledger.html.j2",
        account=account,
        sentences=sentences_of(account),
        factor=_factor(budget["epsilon"]) if budget else None,
        factor_spent=_factor(account["epsilon_spent"]) if budget else None,
        entries=book.entries,
        lines=lines,
        printed=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    )


def _factor(epsilon: float) -> float:
    """Return e to the power of epsilon, infinity where no float is that large."""
    return math.exp(epsilon) if epsilon < math.log(sys.float_info.max) else math.inf


def _studies(budget: Budget | None, entries: Sequence[Entry]) -> list[Account]:
    rows = []
    for digest in dict.fromkeys(entry.study for entry in entries):
        own = [entry for entry in entries if entry.study == digest]
        private = [entry for entry in own if entry.releases is not None]
        releases = history_of(own)
        rows.append(
            {
                "study": own[-1].name,
                "digest": digest,
                "rounds": len({entry.round for entry in own if entry.kind == "train"}),
                "entries": len(own),
                "private": len(private) == len(own),
                "first": own[0].time,
                "last": own[-1].time,
                "releases": [asdict(one) for one in releases],
                "epsilon": epsilon_of_history(budget, releases) if budget and private else None,
            }
        )
    return rows


def _table(account: Account) -> Table:
    titles = ("study", "rounds", "entries", "sigma", "rate", "steps", "epsilon")
    table = Table(*titles, title=f"Ledger of {account['site']}", title_justify="left")
    for row in account["studies"]:
        kinds = row["releases"]
        texts = ["\n".join(f"{kind[key]:g}" for kind in kinds) or "-" for key in ("noise_multiplier", "sample_rate", "steps")]
        spent = "infinite" if not row["private"] else f"{row['epsilon']:.3f}" if row["epsilon"] is not None else "-"
        table.add_row(f"{row['study']} {row['digest'][:12]}", str(row["rounds"]), str(row["entries"]), *texts, spent)
    return table

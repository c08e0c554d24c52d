"""What `icmoe compare` prints."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from icmoe.compare import Change, Comparison, compare, read_results, shown


def compare_and_print(a: Path, b: Path, *, as_json: bool) -> None:
    """Print two rehearsals side by side, as tables or as JSON.

    Raises
    ------
    IcmoeError
        As `read_results`.
    """
    found = compare(read_results(a), read_results(b))
    if as_json:
        sys.stdout.write(json.dumps({"a": str(a), "b": str(b), **found.record()}, indent=1) + "\n")
        return
    console = Console(highlight=False)
    console.print(f"A  {a}\nB  {b}", markup=False, soft_wrap=True)
    console.print(_settings(found))
    console.print(_scores(found.changes))
    for sentence in warnings(found):
        console.print(sentence, markup=False, soft_wrap=True)


def warnings(found: Comparison) -> list[str]:
    """Return what a reader must know before the differences mean anything."""
    sentences = []
    if not found.same_data:
        sentences.append("A and B saw different data: their difference is not one of the settings alone.")
    if found.phantoms:
        sentences.append("Phantoms: the scores say nothing about patients.")
    if found.changes and max(change.seeds for change in found.changes) < 2:
        sentences.append("Fewer than two common seeds: no spread is known, and a difference may be chance.")
    for name, only in (("A", found.only_a), ("B", found.only_b)):
        if only:
            sentences.append(f"Only in {name}: {', '.join(only)}.")
    return sentences


def _settings(found: Comparison) -> Table:
    title = "Set differently" if found.settings else "Nothing is set differently"
    table = Table("key", "A", "B", title=title, title_justify="left", box=SIMPLE)
    for key, values in found.settings.items():
        table.add_row(escape(key), *(escape(shown(value)) for value in values))
    return table


def _scores(changes: tuple[Change, ...]) -> Table:
    table = Table(title="Test Dice (per patient), mean over the seeds that both have", title_justify="left", box=SIMPLE)
    for column in ("method", "score", "A", "B", "B - A", "seeds"):
        table.add_column(column, justify="left" if column in {"method", "score"} else "right")
    for change in changes:
        difference = "-" if change.difference is None else f"{change.difference:+.4f}"
        if change.spread is not None:
            difference += f" +-{change.spread:.4f}"
        values = ("-" if value is None else f"{value:.4f}" for value in (change.a, change.b))
        table.add_row(escape(change.method), escape(change.score), *values, difference, str(change.seeds))
    return table

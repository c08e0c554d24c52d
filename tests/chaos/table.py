"""The results as a table: a line per kind of event, then the studies."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

Row = dict[str, Any]


def seconds(values: Sequence[float]) -> str:
    return f"{median(values):.0f} (longest {max(values):.0f})" if values else ""


def by_kind(rows: Sequence[Row]) -> Table:
    columns = ("event", "times", "in mid-study", "studies finished", "rounds asked again", "bits of the calm run", "refused by")
    table = Table(*columns, "seconds to the next commit", title="What happened", title_justify="left")
    found: dict[str, list[tuple[Row, Row]]] = defaultdict(list)
    for row in rows:
        for event in row.get("events", []):
            found[event["kind"]].append((row, event))
    for kind, pairs in found.items():
        real = [(row, event) for row, event in pairs if "not_possible" not in event]
        if not real:
            table.add_row(kind, "0", f"not possible here: {pairs[0][1]['not_possible']}")
            continue
        studies = {(row["study"], row["family"]): row for row, _ in real}
        mid = sum(1 <= event["after_round"] < row["rounds"] for row, event in real)
        same = sum(row.get("identical") is True for row in studies.values())
        numbers = sorted({f"ICM{row['refused'][kind]}" for row, _ in real if row.get("refused", {}).get(kind)})
        table.add_row(
            kind,
            str(len(real)),
            str(mid),
            f"{sum(row['finished'] for row in studies.values())} of {len(studies)}",
            str(sum(event.get("repeated", 0) for _, event in real)),
            f"{same} of {len(studies)}",
            ", ".join(numbers),
            seconds([event["recovered_s"] for _, event in real if "recovered_s" in event]),
        )
    return table


def by_study(rows: Sequence[Row]) -> Table:
    table = Table("study", "what", "events", "finished", "verdict", "rounds asked again", "Dice", "seconds", title="Studies")
    for row in rows:
        events = [event for event in row.get("events", []) if "not_possible" not in event]
        dice = "" if row.get("dice") is None else f"{row['dice']:.4f}"
        words = [str(row.get("study", "")), row["family"], str(len(events)), "yes" if row["finished"] else "NO"]
        table.add_row(*words, row.get("verdict", ""), str(row["repeated"]), dice, f"{row['seconds']:.0f}")
    return table


def show(rows: Sequence[Row], console: Console) -> None:
    for table in (by_study(rows), by_kind(rows)):
        console.print(table)

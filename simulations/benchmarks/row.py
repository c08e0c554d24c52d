"""One comparison of a benchmark: what we need beside what somebody else needs, and how far apart they may be."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What ours needs and what it is compared with; less is better for both.

    Parameters
    ----------
    what, against
        Ours, and the thing beside it, which ran in turns with ours.
    ours, limit
        Their figures.
    unit
        Of both.
    bar
        As wanted: the most that `ratio` may be, or the least.
    at_most
        True where `ratio` is ours over the limit and shall be small; False where it is the limit over ours and shall be great.
    note
        What has to be known to read the figures.
    """

    what: str
    against: str
    ours: float
    limit: float
    unit: str
    bar: float
    at_most: bool
    note: str = ""

    @property
    def ratio(self) -> float:
        """Ours over the limit, or the other way round where more is wanted."""
        return self.ours / self.limit if self.at_most else self.limit / self.ours

    @property
    def met(self) -> bool:
        """Whether the bar is met."""
        return self.ratio <= self.bar if self.at_most else self.ratio >= self.bar

    def record(self) -> dict[str, Any]:
        """Return everything for JSON."""
        return asdict(self) | {"ratio": self.ratio, "met": self.met}


def show(rows: Sequence[Row], *, as_json: bool) -> None:
    """Print rows as a table or as JSON."""
    if as_json:
        sys.stdout.write(json.dumps([row.record() for row in rows], indent=1) + "\n")
        return
    Console().print(table_of(rows))


def table_of(rows: Iterable[Row]) -> Table:
    """Return rows as people read them."""
    table = Table("what, and what it is compared with", "ours", "limit", "unit", "ratio", "bar", "met", show_lines=True)
    for row in rows:
        lines = [row.what, f"[dim]against[/dim] {row.against}", *([f"[dim]{row.note}[/dim]"] if row.note else [])]
        bar = f"{'<=' if row.at_most else '>='} {_figure(row.bar)}"
        figures = [_figure(row.ours), _figure(row.limit), row.unit, _figure(row.ratio), bar]
        table.add_row("\n".join(lines), *figures, "yes" if row.met else "[bold]no[/bold]")
    return table


def _figure(value: float) -> str:
    if 0.0 < value < 0.05:
        return f"1/{1 / value:.3g}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"

"""Dice against trained parameters, and who is beaten by nobody that costs as little."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from icmoe.atomic import write_atomically
from simulations.evidence.rivals.table import Row

OURS_COLOUR, RIVAL_COLOUR, SHORT_COLOUR = "#c0392b", "#2c3e50", "#95a5a6"
STYLE: dict[Any, Any] = {
    "font.size": 8.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "rivals",
    "axes.spines.top": False,
    "axes.spines.right": False,
}
LABEL_LEFT_ABOVE = 1_000_000
PANELS = (("one model, averaged over the sites", ("FedAvg", "router-aware")), ("pooled data", ("pooled",)))


def front(rows: Sequence[Row]) -> list[tuple[int, float]]:
    """Return parameters and Dice of the rows that no other one reaches with at most as many parameters, small to large.

    Rows that were not run, or for fewer rounds only, take no part.
    """
    points = [(row.parameters, row.mean) for row in rows if row.parameters is not None and row.mean is not None and not row.short]
    kept: list[tuple[int, float]] = []
    for parameters, mean in sorted(points, key=lambda point: (point[0], -point[1])):
        if not kept or mean > kept[-1][1]:
            kept.append((parameters, mean))
    return kept


def write_pareto(folder: Path, rows: Sequence[Row]) -> None:
    """Write pareto.svg: one panel for models of all sites by averaging, one for pooled data."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.0, 4.2), layout="constrained")
        for axes, (title, regimes) in zip(figure.subplots(1, 2, sharey=True), PANELS, strict=True):
            _panel(axes, title, [row for row in rows if row.regime in regimes])
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    write_atomically(folder / "pareto.svg", buffer.getvalue())


def _panel(axes: Axes, title: str, rows: Sequence[Row]) -> None:
    there = {row.title for row in rows if row.mean is not None}
    missing = "; ".join(row.title for row in rows if row.title not in there)
    axes.set_title(title, loc="left")
    axes.set_xscale("log")
    axes.set_xlabel("trained parameters" + (f"\n{textwrap.fill(f'not run: {missing}', 58)}" if missing else ""))
    axes.set_ylabel("Dice, mean of sites")
    for row in rows:
        if row.mean is None or row.parameters is None:
            continue
        colour = OURS_COLOUR if row.ours else SHORT_COLOUR if row.short else RIVAL_COLOUR
        note = f"{row.title} ({row.rounds} rounds)" if row.short else row.title
        axes.errorbar(row.parameters, row.mean, yerr=row.spread, fmt="*" if row.ours else "o", color=colour)
        right = row.parameters > LABEL_LEFT_ABOVE
        shift, side = ((-6, 4), "right") if right else ((6, 4), "left")
        label = axes.annotate(
            note, (row.parameters, row.mean), xytext=shift, textcoords="offset points", ha=side, color=colour, fontsize=7
        )
        label.set_in_layout(False)
    axes.set_xlim(5e4, 1.2e7)
    if line := front(rows):
        axes.step(*zip(*line, strict=True), where="post", color=RIVAL_COLOUR, linewidth=0.8)

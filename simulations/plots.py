"""Plots of a simulation as inline SVG that follows the page's light or dark colours.

Matplotlib draws with stand-in colours, which `_inline` replaces by CSS variables; text stays text. Only `Figure` objects are
used, so nothing of pyplot's global state is touched.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from simulations.findings import (
    ALONE,
    Point,
    Results,
    curve,
    last_usage,
    method_name,
    methods,
    site_estimate,
    sites,
    total,
)

INK, MUTED, GRID, HEAT = "#010101", "#020202", "#030303", "#040404"
SERIES = tuple(f"#0a0a{index:02x}" for index in range(9))  # as many as there are methods
MARKERS = "osD^vPX*>"
SYMBOLS = "●■◆▲▼✚✖★▶"
"""`MARKERS` as characters, for the legend."""
VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--line", HEAT: "--heat"} | {
    colour: f"--series-{index}" for index, colour in enumerate(SERIES)
}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
}
WIDTH_IN = 4.3


@dataclass(frozen=True, slots=True)
class Plot:
    """A picture of the report.

    Parameters
    ----------
    key
        Unique in the page; prefix of the ids inside the SVG.
    title
        Heading.
    caption
        What is drawn and how to read it.
    alternative
        The numbers in words, for readers who do not see the picture.
    svg
        An `<svg>` element without any outside reference.
    legend
        Symbol, name and CSS variable of the colour per series; text of the page, so that it wraps on a phone.
    """

    key: str
    title: str
    caption: str
    alternative: str
    svg: str
    legend: tuple[tuple[str, str, str], ...]


def plots(results: Results) -> list[Plot]:
    """Return every plot for which `results` has numbers."""
    drawn = [
        _curves(results, "val_dice", "Validation Dice by round", "mean over sites; larger is better"),
        _curves(results, "loss", "Training loss by round", "mean over sites; smaller is better"),
        _site_bars(results),
        _usage_map(results),
        _curves(results, "usage_spread", "Spread of usage between sites", "near 0: router-aware equals FedAvg"),
        _stacked(results, "bytes", "Bytes sent over all rounds", "MB", BYTES),
        _stacked(results, "seconds", "Seconds per phase over all rounds", "s", PHASES),
    ]
    return [plot for plot in drawn if plot is not None]


def method_colours(results: Results) -> dict[str, str]:
    """Return the stand-in colour of each method, the same in every plot."""
    return {method: SERIES[index % len(SERIES)] for index, method in enumerate(methods(results))}


def as_plot(key: str, title: str, caption: str, alternative: str, height_in: float, draw: Callable[[Axes], object]) -> Plot:
    """Return what `draw` puts on the axes as a picture of the page."""
    with mpl.rc_context(STYLE | {"svg.hashsalt": key}):
        figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
        draw(figure.subplots())
        legend = _legend(figure.axes[0])
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return Plot(key, title, caption, alternative, _inline(buffer.getvalue(), key), legend)


def _inline(document: str, key: str) -> str:
    """Return Matplotlib's SVG document as an element for HTML: no outside name, unique ids, the page's colours."""
    svg = document[document.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>", "", svg, flags=re.DOTALL)
    head, body = svg.split(">", 1)
    head = re.sub(r'\s(?:xmlns(?::\w+)?|width|height|version)="[^"]*"', "", head) + ' aria-hidden="true" focusable="false"'
    body = body.replace("xlink:href", "href")
    body = re.sub(r'(\sid="|href="#|url\(#)', rf"\1{key}-", body)
    # Colours stand in style attributes only; labels that look like a colour are text and stay.
    body = re.sub(r'style="[^"]*"', lambda match: _recoloured(match[0]), body)
    return f"{head}>{body}".strip()


def _recoloured(style: str) -> str:
    for colour, variable in VARIABLES.items():
        style = style.replace(colour, f"var({variable})")
    return style


def _legend(axes: Axes) -> tuple[tuple[str, str, str], ...]:
    """Return the legend of the series, none for a single one."""
    entries = []
    for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
        if isinstance(handle, Line2D):
            entries.append((SYMBOLS[MARKERS.index(str(handle.get_marker()))], label, VARIABLES[str(handle.get_color())]))
        elif isinstance(handle, BarContainer):
            entries.append(("■", label, VARIABLES[to_hex(handle.patches[0].get_facecolor())]))
    return tuple(entries) if len(entries) > 1 else ()


def _curves(results: Results, key: str, title: str, hint: str) -> Plot | None:
    # Models that never meet have no spread worth reading.
    shown = [method for method in methods(results) if key != "usage_spread" or method not in ALONE]
    curves = {method: points for method in shown if (points := curve(results, method, key))}
    if not curves:
        return None
    colours = method_colours(results)

    def draw(axes: Axes) -> None:
        for index, (method, points) in enumerate(curves.items()):
            _curve(axes, points, colours[method], MARKERS[index % len(MARKERS)], method_name(method))
        axes.set_xlabel("round")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y")
        axes.margins(x=0.02)
        if key == "usage_spread":
            axes.set_ylim(bottom=0)

    words = [
        f"{method_name(method)}: {points[0].mean:.3f} in round {points[0].round}, {points[-1].mean:.3f} in round "
        f"{points[-1].round}"
        for method, points in curves.items()
    ]
    caption = f"Line: mean over seeds, band: least to largest seed; {hint}."
    return as_plot(f"curve-{key.replace('_', '-')}", title, caption, f"{title}. {'; '.join(words)}.", 2.7, draw)


def _curve(axes: Axes, points: Sequence[Point], colour: str, marker: str, label: str) -> None:
    rounds = [point.round for point in points]
    axes.fill_between(rounds, [p.low for p in points], [p.high for p in points], color=colour, alpha=0.15, linewidth=0)
    every = max(1, len(points) // 8)
    axes.plot(rounds, [p.mean for p in points], color=colour, marker=marker, markersize=4, markevery=every, label=label)


def _site_bars(results: Results) -> Plot | None:
    names, rows = methods(results), [site for site in sites(results) if _has_score(results, site)]
    if not rows:
        return None
    colours = method_colours(results)
    thickness = 0.8 / len(names)

    def draw(axes: Axes) -> None:
        for index, method in enumerate(names):
            scores = [site_estimate(results, method, site, "dice") for site in rows]
            at = [row - 0.4 + thickness * (index + 0.5) for row in range(len(rows))]
            axes.barh(
                at,
                [score.mean or 0.0 for score in scores],
                height=thickness * 0.88,
                xerr=[score.deviation or 0.0 for score in scores],
                error_kw={"ecolor": MUTED, "elinewidth": 0.8},
                color=colours[method],
                label=method_name(method),
            )
        axes.set_yticks(range(len(rows)), rows)
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.set_xlabel("Dice on the test patients")
        axes.grid(axis="x")
        axes.tick_params(axis="y", length=0)

    caption = "Mean over seeds, whiskers: standard deviation between seeds. Local: the sites' models, each used at every site."
    if "personalised" in names:
        caption += " Personalised: each at its own."
    height_in = 0.7 + len(rows) * max(0.42, 0.13 * len(names))
    return as_plot("bars", "Test Dice by site and method", caption, _bars_in_words(results, rows), height_in, draw)


def _has_score(results: Results, site: str) -> bool:
    return any(site_estimate(results, method, site, "dice").mean is not None for method in methods(results))


def _bars_in_words(results: Results, rows: Sequence[str]) -> str:
    words = []
    for site in rows:
        scores = {method_name(m): site_estimate(results, m, site, "dice").mean for m in methods(results)}
        words.append(f"{site}: " + ", ".join(f"{name} {value:.3f}" for name, value in scores.items() if value is not None))
    return f"Test Dice by site and method. {'; '.join(words)}."


def _usage_map(results: Results) -> Plot | None:
    found = last_usage(results)
    if found is None:
        return None
    method, rows, usage = found
    count = len(usage[0])
    experts = list(results.get("experts", []))
    columns = experts if len(experts) == count else [f"expert-{index + 1}" for index in range(count)]
    largest = max(max(row) for row in usage) or 1.0

    def draw(axes: Axes) -> None:
        heat(axes, [[share / largest for share in row] for row in usage], _percent(usage), rows, columns)

    words = []
    for site, row in zip(rows, usage, strict=True):
        words.append(f"{site}: " + ", ".join(f"{name} {100 * share:.0f}%" for name, share in zip(columns, row, strict=True)))
    caption = f"{method_name(method)}, last round, mean over seeds: share of gate mass per expert; a row sums to 100 %."
    height_in = 0.9 + 0.34 * len(rows)
    return as_plot("usage", "Usage by site and expert", caption, f"Usage in the last round. {'; '.join(words)}.", height_in, draw)


def _percent(usage: Sequence[Sequence[float]]) -> list[list[str]]:
    return [[f"{100 * share:.0f}%" for share in row] for row in usage]


def heat(
    axes: Axes,
    shares: Sequence[Sequence[float | None]],
    texts: Sequence[Sequence[str]],
    rows: Sequence[str],
    columns: Sequence[str],
) -> None:
    """Draw a table whose cells are the darker the larger their share, 0 to 1; a cell of None has its text alone."""
    for y, row in enumerate(shares):
        for x, share in enumerate(row):
            if share is not None:
                # Opacity, at most 0.75, lets the same ink stay readable on light and dark pages.
                axes.add_patch(Rectangle((x, y), 0.96, 0.94, facecolor=HEAT, alpha=0.05 + 0.7 * share, linewidth=0))
            axes.text(x + 0.48, y + 0.48, texts[y][x], ha="center", va="center", fontsize=8.5)
    axes.set_xlim(0, len(columns))
    axes.set_ylim(len(rows), 0)
    axes.set_yticks([y + 0.48 for y in range(len(rows))], list(rows))
    axes.set_xticks([x + 0.48 for x in range(len(columns))], list(columns), rotation=30, ha="right", rotation_mode="anchor")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


BYTES = {"up (sites to server)": ("bytes_up",), "down (server to sites)": ("bytes_down",)}
"""Parts of a round's traffic and the path to each in the round."""
PHASES = {phase: ("seconds", phase) for phase in ("train", "evaluate", "aggregate")}
"""Parts of a round's time and the path to each in the round."""


def _stacked(results: Results, key: str, title: str, unit: str, parts: Mapping[str, tuple[str, ...]]) -> Plot | None:
    scale = 1e-6 if unit == "MB" else 1.0
    shown = [method for method in methods(results) if key != "bytes" or method not in ALONE]
    values = {m: _scaled([total(results, m, *path) for path in parts.values()], scale) for m in shown}
    values = {method: row for method, row in values.items() if any(value for value in row)}
    if not values:
        return None

    def draw(axes: Axes) -> None:
        left = [0.0] * len(values)
        for index, part in enumerate(parts):
            widths = [row[index] or 0.0 for row in values.values()]
            axes.barh(range(len(values)), widths, left=left, height=0.6, color=SERIES[index], label=part)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        for y, end in enumerate(left):
            axes.annotate(f"{end:,.1f}", (end, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8.5)
        axes.set_yticks(range(len(values)), [method_name(method) for method in values])
        axes.invert_yaxis()
        axes.margins(x=0.2)
        axes.set_xlabel(unit)
        axes.grid(axis="x")
        axes.tick_params(axis="y", length=0)

    words = [
        f"{method_name(m)}: " + ", ".join(f"{p} {v:.1f} {unit}" for p, v in zip(parts, row, strict=True) if v is not None)
        for m, row in values.items()
    ]
    clock = "Sum over rounds, mean over seeds. On the clock; of local models, the sites' own seconds added."
    caption = "Sum over rounds and sites, mean over seeds." if key == "bytes" else clock
    return as_plot(key, title, caption, f"{title}. {'; '.join(words)}.", 0.7 + 0.36 * len(values), draw)


def _scaled(values: Sequence[float | None], scale: float) -> list[float | None]:
    return [None if value is None else value * scale for value in values]

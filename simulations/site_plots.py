"""Plots by site: each model at each site, use of the experts over the rounds, and what the sites told of their data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from simulations.cross_site import matrix
from simulations.findings import Results, last_usage, method_name, runs
from simulations.plots import MARKERS, SERIES, Plot, as_plot, heat

PANELS = 2
"""Small multiples stand side by side so many to a row."""
MOST_SITES = len(SERIES)
"""More lines in a panel could not be told apart."""
MOST_COLUMNS = 12
"""Numbers in narrower cells of the heat map would run into each other; the table has them."""
RANGES = {"in_plane_mm": ("Pixel distance", "mm"), "between_mm": ("Slice distance", "mm"), "side_px": ("Image side", "pixels")}


def cross_plots(results: Results) -> list[Plot]:
    """Return the heat map of models and sites; none where nothing was scored."""
    names, columns, scores = matrix(results)
    if not names or len(columns) < 2:
        return []
    values = [[score["mean"] for score in row] for row in scores]
    fits = len(columns) <= MOST_COLUMNS
    texts = [["" if value is None or not fits else f"{value:.2f}" for value in row] for row in values]
    words = [
        f"{name}: " + ", ".join(f"{column} {value:.3f}" for column, value in zip(columns, row, strict=True) if value is not None)
        for name, row in zip(names, values, strict=True)
    ]
    title = "Test Dice of each model at each site"
    height_in = 0.9 + 0.3 * len(names)
    return [
        as_plot(
            "cross-site",
            title,
            "Rows: models; columns: whose test patients. Mean over seeds; the darker, the larger.",
            f"{title}. {'; '.join(words)}.",
            height_in,
            lambda axes: heat(axes, values, texts, names, columns),
        )
    ]


def usage_over_rounds(results: Results, method: str) -> dict[str, dict[int, list[float]]]:
    """Return the usage of each expert by site and round, averaged over the seeds that report it."""
    told: dict[str, dict[int, list[list[float]]]] = {}
    for run in runs(results, method):
        for entry in run.get("rounds", []):
            for site, row in entry.get("sites", {}).items():
                if row.get("usage"):
                    told.setdefault(site, {}).setdefault(int(entry["round"]), []).append(row["usage"])
    return {
        site: {at: [math.fsum(column) / len(column) for column in zip(*rows, strict=True)] for at, rows in sorted(by.items())}
        for site, by in sorted(told.items())
    }


def usage_plots(results: Results) -> list[Plot]:
    """Return usage by round, a small panel per expert and a line per site; none where no site reports usage."""
    found = last_usage(results)
    if found is None:
        return []
    method, names, last = found
    usage, shown = usage_over_rounds(results, method), names[:MOST_SITES]
    count = len(last[0])
    experts = list(results.get("experts", []))
    experts = experts if len(experts) == count else [f"expert-{index + 1}" for index in range(count)]
    words = [f"{expert}: {_ends(usage, shown, index)}" for index, expert in enumerate(experts)]
    caption = f"{method_name(method)}, mean over seeds: share of gate mass, a panel per expert, a line per site."
    if len(names) > len(shown):
        caption += f" The first {len(shown)} of {len(names)} sites."
    title = "Use of each expert by round"
    height_in = 0.5 + 1.25 * math.ceil(count / PANELS)
    panels = _panels({site: usage[site] for site in shown}, experts)
    return [as_plot("usage-rounds", title, caption, f"{title}. {'; '.join(words)}.", height_in, panels)]


def _ends(usage: Mapping[str, Mapping[int, Sequence[float]]], sites: Sequence[str], expert: int) -> str:
    ends = {site: (rows[min(rows)][expert], rows[max(rows)][expert]) for site, rows in usage.items() if site in sites}
    return ", ".join(f"{site} {100 * first:.0f}% to {100 * last:.0f}%" for site, (first, last) in ends.items())


def _panels(usage: Mapping[str, Mapping[int, Sequence[float]]], experts: Sequence[str]) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        figure = axes.get_figure(root=True)
        assert figure is not None
        axes.remove()
        top = 108 * max((max(row) for rows in usage.values() for row in rows.values()), default=1.0)
        grid = figure.subplots(math.ceil(len(experts) / PANELS), PANELS, sharex=True, sharey=True, squeeze=False).flat
        for index, panel in enumerate(grid):
            if index >= len(experts):
                panel.set_visible(False)
                continue
            for number, (site, rows) in enumerate(usage.items()):
                shares = [100 * row[index] for row in rows.values()]
                marker = MARKERS[number % len(MARKERS)]
                panel.plot(list(rows), shares, color=SERIES[number], marker=marker, markersize=3, linewidth=1, label=site)
            panel.set_title(experts[index], fontsize=8.5)
            panel.set_ylim(0, top)  # of all panels: the first one's own would cut the others
            panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))
            panel.grid(axis="y")
        figure.supxlabel("round", fontsize=9)
        figure.supylabel("% of gate mass", fontsize=9)

    return draw


def check_plots(results: Results) -> list[Plot]:
    """Return what the sites' summaries release, as pictures: counts in tens, label rates, ranges of the geometry."""
    summaries = (results.get("data_check") or {}).get("summaries", {})
    if not summaries:
        return []
    drawn = [_counts(summaries), _rates(summaries, list(results.get("labels", []))[1:])]
    drawn += [_ranges(summaries, key, *names) for key, names in RANGES.items()]
    return [plot for plot in drawn if plot is not None]


def _counts(summaries: Mapping[str, Any]) -> Plot | None:
    rows = {part: [summary[part] or 0 for summary in summaries.values()] for part in ("images", "patients")}
    words = [f"{site}: at most {s['images']} images of {s['patients']} patients" for site, s in summaries.items()]
    caption = "Training data as each site told it: counts rounded up to ten, so a bar is an upper bound."
    return _bars("check-counts", "Training images and patients by site", caption, list(summaries), rows, "at most", words)


def _rates(summaries: Mapping[str, Any], labels: Sequence[str]) -> Plot | None:
    sites = [site for site, summary in summaries.items() if summary["labels"] and summary["images"]]
    rows: dict[str, list[float]] = {
        label: [100 * (summaries[site]["labels"][index]["images"] or 0) / summaries[site]["images"] for site in sites]
        for index, label in enumerate(labels)
    }
    if not sites or not rows:
        return None
    words = [f"{site}: " + ", ".join(f"{label} {row[at]:.0f}%" for label, row in rows.items()) for at, site in enumerate(sites)]
    caption = "Images that show a class, of all training images. Both counts are rounded up to ten: a guide, not a measurement."
    return _bars("check-rates", "Images with each class, by site", caption, sites, rows, "% of images, about", words)


def _bars(
    key: str, title: str, caption: str, sites: Sequence[str], rows: Mapping[str, Sequence[float]], unit: str, words: Sequence[str]
) -> Plot:
    thickness = 0.8 / len(rows)

    def draw(axes: Axes) -> None:
        for index, (name, values) in enumerate(rows.items()):
            at = [y - 0.4 + thickness * (index + 0.5) for y in range(len(sites))]
            axes.barh(at, values, height=thickness * 0.88, color=SERIES[index % len(SERIES)], label=name)
        _site_axis(axes, sites, unit)

    return as_plot(key, title, caption, f"{title}. {'; '.join(words)}.", 0.7 + len(sites) * max(0.34, 0.13 * len(rows)), draw)


def _ranges(summaries: Mapping[str, Any], key: str, name: str, unit: str) -> Plot | None:
    ends = {site: summary[key] for site, summary in summaries.items() if summary[key]}
    if not ends:
        return None
    title = f"{name} by site"

    def draw(axes: Axes) -> None:
        for y, (low, high) in enumerate(ends.values()):
            axes.plot([low, high], [y, y], color=SERIES[0], marker=MARKERS[0], markersize=5, linewidth=3)
        _site_axis(axes, list(ends), unit)

    words = [f"{site}: {low:g} to {high:g} {unit}" for site, (low, high) in ends.items()]
    caption = "Least and greatest value in coarse steps; sites that withheld it are left out."
    return as_plot(
        f"check-{key.replace('_', '-')}", title, caption, f"{title}. {'; '.join(words)}.", 0.7 + 0.34 * len(ends), draw
    )


def _site_axis(axes: Axes, sites: Sequence[str], unit: str) -> None:
    axes.set_yticks(range(len(sites)), list(sites))
    axes.set_ylim(len(sites) - 0.4, -0.6)
    axes.set_xlabel(unit)
    axes.margins(x=0.08)
    axes.grid(axis="x")
    axes.tick_params(axis="y", length=0)

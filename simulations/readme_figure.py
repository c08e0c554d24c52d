"""The README's picture: the median test slice beside the test Dice of each site and method."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from icmoe.atomic import write_atomically
from simulations.findings import Estimate, method_name, methods, over_sites, site_estimate, sites
from simulations.overlays import Overlay, pictures

SIZE_LIMIT_BYTES = 300_000
SIZE_IN, DOTS_PER_INCH = (14.0, 6.0), 100
INK, MUTED, LINE = "#17202b", "#5a6675", "#dfe4ea"
COLOURS = ("#1f5fbf", "#d97706", "#7d8794", "#15803d", "#a21caf", "#0891b2", "#be123c", "#4d7c0f", "#5b3a1e")
STYLE: dict[Any, Any] = {
    "font.size": 13,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": MUTED,
    "grid.color": LINE,
    "legend.fontsize": 12,
    "legend.handlelength": 1.0,
    "legend.handletextpad": 0.5,
    "legend.columnspacing": 1.2,
}


def figure_from_results(results: Mapping[str, Any], overlays: Sequence[Overlay], path_png: Path) -> None:
    """Write the picture atomically: a PNG of 1400 x 600 pixels, below 300 kB.

    Parameters
    ----------
    results
        Results of a simulation, schema version 1.
    overlays
        The one whose title says "median" is shown, else the middle one.
    path_png
        The file; its folder is made.

    Raises
    ------
    ValueError
        Where there is no overlay or no method.
    """
    if not overlays or not methods(results):
        raise ValueError(f"{len(overlays)} overlays and {len(methods(results))} methods: at least one of each expected")
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=SIZE_IN, dpi=DOTS_PER_INCH)
        _slice(figure, _median(overlays), phantoms=bool(results.get("phantoms")))
        _bars(figure, results)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH)
    with Image.open(buffer) as picture:
        write_atomically(path_png, _png(picture.convert("RGB")))


def _median(overlays: Sequence[Overlay]) -> Overlay:
    named = [overlay for overlay in overlays if "median" in overlay.title.lower()]
    return named[0] if named else overlays[len(overlays) // 2]


def _slice(figure: Figure, overlay: Overlay, *, phantoms: bool) -> None:
    for index, (name, picture_HW3) in enumerate(zip(("image", "truth", "prediction"), pictures(overlay), strict=True)):
        axes = figure.add_axes((0.02 + 0.161 * index, 0.14, 0.155, 0.72))
        axes.imshow(picture_HW3)
        axes.set_axis_off()
        axes.set_title(name, fontsize=14)
    kind = "phantom" if phantoms else "patient"
    figure.text(0.02, 0.93, f"Median test {kind}", fontsize=16, fontweight="bold", va="center")
    note = "Line: outline of the truth." + (" Phantoms: images drawn by a program, not patients." if phantoms else "")
    figure.text(0.02, 0.07, note, fontsize=12, color=MUTED, va="center")


def _bars(figure: Figure, results: Mapping[str, Any]) -> None:
    axes = figure.add_axes((0.555, 0.2, 0.435, 0.64))
    names = methods(results)
    places = [
        site for site in sites(results) if any(site_estimate(results, name, site, "dice").mean is not None for name in names)
    ]
    width = 0.8 / len(names)
    for index, method in enumerate(names):
        scores = [site_estimate(results, method, site, "dice") for site in places] + [over_sites(results, method, "dice")]
        _series(axes, scores, index - (len(names) - 1) / 2, width, COLOURS[index % len(COLOURS)], method_name(method))
    axes.axvline(len(places) - 0.5, color=MUTED, linewidth=1, linestyle=":")
    axes.set_xticks(range(len(places) + 1), [*places, "mean"], rotation=0 if len(places) < 9 else 40)
    axes.get_xticklabels()[-1].set_fontweight("bold")
    axes.set_ylim(0, 1)
    axes.grid(axis="y")
    axes.tick_params(axis="x", length=0)
    figure.text(0.527, 0.93, "Test Dice by site and method", fontsize=16, fontweight="bold", va="center")
    handles, labels = axes.get_legend_handles_labels()
    columns = len(names) if len(names) <= 5 else 4
    figure.legend(handles, labels, loc="center left", bbox_to_anchor=(0.52, 0.07), ncols=columns, frameon=False)


def _series(axes: Axes, scores: Sequence[Estimate], offset: float, width: float, colour: str, label: str) -> None:
    at = [place + offset * width for place in range(len(scores))]
    heights = [score.mean or 0.0 for score in scores]
    whiskers = [score.deviation or 0.0 for score in scores]
    axes.bar(
        at, heights, width=0.9 * width, yerr=whiskers, error_kw={"ecolor": MUTED, "elinewidth": 1}, color=colour, label=label
    )


def _png(picture: Image.Image) -> bytes:
    """Return the picture as PNG, with as many colours as the size limit allows."""
    for colours in (None, 256, 128, 64, 32):
        buffer = io.BytesIO()
        reduced = picture if colours is None else picture.quantize(colours, dither=Image.Dither.NONE)
        reduced.save(buffer, format="PNG", optimize=True)
        if buffer.tell() < SIZE_LIMIT_BYTES:
            break
    return buffer.getvalue()

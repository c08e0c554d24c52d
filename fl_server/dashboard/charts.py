"""Line charts as plain geometry: the template draws them as SVG without any inline style, so that the page's rules hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 320, 168
LEFT, RIGHT, TOP, BOTTOM = 38, 10, 10, 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A chart in a box of `WIDTH` by `HEIGHT` units.

    Parameters
    ----------
    segments
        Points of the line as SVG writes them; one segment per stretch of rounds that have a value.
    dots
        Its points as x, y: all where they are few, else the last.
    references
        Name and height of each level line.
    ticks_y, ticks_x
        Place and text.
    """

    segments: tuple[str, ...]
    dots: tuple[tuple[float, float], ...]
    references: tuple[tuple[str, float], ...]
    ticks_y: tuple[tuple[float, str], ...]
    ticks_x: tuple[tuple[float, str], ...]

    @property
    def box(self) -> str:
        """The SVG's viewBox."""
        return f"0 0 {WIDTH} {HEIGHT}"

    @property
    def span(self) -> tuple[int, int]:
        """Left and right end of the plot."""
        return LEFT, WIDTH - RIGHT


MOST_DOTS = 24


def line_chart(values_R: Sequence[float | None], *, rounds: int, top: float, levels: Mapping[str, float | None]) -> Chart:
    """Return the chart of a value over the rounds.

    Parameters
    ----------
    values_R
        One per round so far, None where there is none.
    rounds
        Of the whole study: the axis shows what is still to come.
    top
        Upper end of the axis, which begins at 0.
    levels
        Level lines by name; None is left out.
    """

    def x(number: int) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * (number - 1) / max(rounds - 1, 1), 1)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * min(max(value / top, 0.0), 1.0), 1)

    points = [(x(number), y(value)) if value is not None else None for number, value in enumerate(values_R, start=1)]
    known = [point for point in points if point is not None]
    return Chart(
        segments=tuple(" ".join(f"{a:g},{b:g}" for a, b in part) for part in _stretches(points) if len(part) > 1),
        dots=tuple(known if len(known) <= MOST_DOTS else known[-1:]),
        references=tuple((name, y(level)) for name, level in levels.items() if level is not None),
        ticks_y=tuple((y(top * share), f"{top * share:.3g}") for share in (0.0, 0.5, 1.0)),
        ticks_x=tuple((x(number), str(number)) for number in sorted({1, (rounds + 1) // 2, rounds})),
    )


def _stretches(points: Sequence[tuple[float, float] | None]) -> list[list[tuple[float, float]]]:
    parts: list[list[tuple[float, float]]] = [[]]
    for point in points:
        if point is None:
            parts.append([])
        else:
            parts[-1].append(point)
    return parts


def rounded_up(value: float) -> float:
    """Return the next of 1, 2, 5 times a power of ten: a readable upper end of an axis."""
    if value <= 0.0 or not math.isfinite(value):
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= value * (1.0 - 1e-9))

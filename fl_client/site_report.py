"""`fl_client report`: one page on a site's studies, made of its own records; it stays at the site."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from fl_client.accounts import account_of, sentences_of
from fl_client.history import Row, cells, rounds_of
from fl_client.pages import rendered
from fl_client.site import read_named, records_of
from icmoe.atomic import write_atomically
from icmoe.private import file_errors

FILE = "report.html"
WIDTH, HEIGHT = 640, 160
"""Of a curve, in SVG units."""


def write_report(path: Path, name: str, out: Path | None) -> Path:
    """Write the page and return where it is.

    Parameters
    ----------
    path
        The site file.
    name
        The site.
    out
        The file; `report.html` in the state folder where None.

    Raises
    ------
    IcmoeError
        As `read_named` and `Records.agreement`; 205 where it cannot be written.
    """
    settings = read_named(path, name)
    records = records_of(path, settings)
    book, lines = records.agreement()
    rounds = rounds_of(lines)
    text = rendered(
        "site_report.html.j2",
        site=settings.name,
        studies=[_study(digest, rounds) for digest in dict.fromkeys(row["digest"] for row in rounds)],
        sentences=sentences_of(account_of(settings, book)),
        lines=len(lines),
        head=lines[-1]["hash"] if lines else "none",
        printed=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        width=WIDTH,
        height=HEIGHT,
    )
    target = out or records.state / FILE
    with file_errors():
        write_atomically(target, text.encode(), private=True)
    return target


def _study(digest: str, rounds: Sequence[Row]) -> dict[str, object]:
    rows = [row for row in rounds if row["digest"] == digest]
    dice = {row["round"]: row["val_dice"] for row in rows if row["val_dice"] is not None}
    return {
        "name": rows[-1]["study"],
        "digest": digest,
        "rows": [cells(row) for row in rows],
        "points": points(dice),
        "dice": sorted(dice.items()),
        "sent": sum(row["outcome"] == "sent" for row in rows),
        "declined": sum(row["outcome"] == "declined" for row in rows),
        "held_back": sum(row["outcome"] == "held back" for row in rows),
    }


def points(dice: dict[int, float]) -> list[tuple[float, float]]:
    """Return Dice by round as points of a curve: rounds from left to right, 0 to 1 from bottom to top."""
    if not dice:
        return []
    first, last = min(dice), max(dice)
    span = max(last - first, 1)
    return [(round((number - first) / span * WIDTH, 1), round((1.0 - dice[number]) * HEIGHT, 1)) for number in sorted(dice)]

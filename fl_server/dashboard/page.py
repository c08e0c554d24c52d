"""The page as HTML: a template over a snapshot, every text escaped, no script and no style inside."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from fl_server.dashboard.charts import Chart, line_chart, rounded_up
from fl_server.dashboard.snapshot import SiteRow, Snapshot
from icmoe import __version__
from icmoe.errors import CATALOGUE, Fault

DASH = "\N{EN DASH}"
RELOAD_S = 15
"""Seconds between reloads where there is no script."""
MOST_ROUNDS = 50
"""Rounds of the tables; `state.json` has all."""
HEAT_LEVELS = 10
STATIC = {"style.css": "text/css", "live.js": "text/javascript", "icon.svg": "image/svg+xml"}
STANDINGS = {
    "answered": "has answered",
    "awaited": "awaited",
    "overdue": "late: did not answer in time",
    "not connected": "not connected",
    "sits out": "sits out after refused updates",
    "not in this run": "not in this run",
    "took part": "took part in the last round",
    "missing": "missed the last round",
}
PHASES = {
    "nothing yet": "no study yet",
    "submitted": "submitted",
    "waits for sites": "waits for sites",
    "running": "running",
    "not running": "not running",
    "stopped": "stopped",
    "complete": "complete",
}


def static(name: str) -> bytes:
    """Return a file that the page loads; `name` is one of `STATIC`."""
    return files("fl_server.dashboard").joinpath("static", name).read_bytes()


def render(snapshot: Snapshot, *, now: datetime | None = None) -> str:
    """Return the whole page.

    Parameters
    ----------
    snapshot
        What it shows.
    now
        When it is read.
    """
    moment = datetime.now(UTC) if now is None else now
    loss_top = rounded_up(max((loss for site in snapshot.sites for loss in site.loss_R if loss is not None), default=1.0))
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            s=snapshot,
            now=moment,
            title=snapshot.study or "No study yet",
            lead=lead(snapshot),
            phases=PHASES,
            standings=STANDINGS,
            dice=[(site, dice_chart(snapshot, site), dice_sentence(snapshot, site)) for site in _heard(snapshot)],
            loss=[(site, loss_chart(snapshot, site, loss_top), loss_sentence(site)) for site in _heard(snapshot)],
            heat=_heat(snapshot),
            largest_bytes=max((site.bytes_up + site.bytes_down for site in snapshot.sites), default=0) or 1,
            recent=range(max(0, len(snapshot.history) - MOST_ROUNDS), len(snapshot.history)),
            entries=CATALOGUE,
            reload_s=RELOAD_S,
            version=__version__,
        )
    )


def refusal(fault: Fault) -> str:
    """Return a fault as a page of its own."""
    return _environment().get_template("refusal.html.j2").render(fault=fault, entry=CATALOGUE[fault.number])


@cache
def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("fl_server.dashboard", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"dice": score, "size": size, "duration": duration, "clock": clock, "last": last}
    return made


def lead(snapshot: Snapshot) -> str:
    """Return where the study stands in one sentence, for the eye and for a screen reader's announcements."""
    if snapshot.phase == "nothing yet":
        return "No study was submitted yet: fl_server run STUDY.toml --home DIR. This page shows it when it is."
    done = f"{snapshot.rounds_done} of {snapshot.rounds} rounds are done"
    if snapshot.phase == "submitted":
        return "Submitted; the run has not begun to wait for its sites."
    if snapshot.phase == "complete":
        return f"Complete: {done}, and the model is written."
    if snapshot.phase in {"stopped", "not running"}:
        return f"No run of it lives on this machine; {done}. fl_server run goes on after the last one."
    if snapshot.phase == "waits for sites":
        return f"Waits until {snapshot.quorum} sites are connected; {done}."
    wait = snapshot.wait
    if wait is None:
        return f"Running; {done}."
    late = f"waits for {_listed(wait.awaited)}" if wait.awaited else "all that were asked have answered"
    return f"{wait.what[:1].upper()}{wait.what[1:]}: {late}; {done}."


def _listed(names: Sequence[str], most: int = 6) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def _heard(snapshot: Snapshot) -> list[SiteRow]:
    return [site for site in snapshot.sites if site.rounds_used]


def dice_chart(snapshot: Snapshot, site: SiteRow) -> Chart:
    """Return a site's validation Dice over the rounds, with its reference lines."""
    levels = _levels(snapshot, site)
    return line_chart(site.dice_R, rounds=snapshot.rounds, top=1.0, levels=levels)


def _levels(snapshot: Snapshot, site: SiteRow) -> dict[str, float | None]:
    found = snapshot.references
    return {} if found is None else {"local": found.local.get(site.name), "pooled": found.pooled}


def dice_sentence(snapshot: Snapshot, site: SiteRow) -> str:
    """Return a site's Dice in words."""
    scored = [(number, value) for number, value in enumerate(site.dice_R, start=1) if value is not None]
    lines = [f"{name} {value:.3f}" for name, value in _levels(snapshot, site).items() if value is not None]
    beside = f" Rehearsed: {', '.join(lines)}." if lines else ""
    return _course(scored, "no score yet") + beside


def loss_chart(snapshot: Snapshot, site: SiteRow, top: float) -> Chart:
    """Return a site's training loss over the rounds."""
    return line_chart(site.loss_R, rounds=snapshot.rounds, top=top, levels={})


def loss_sentence(site: SiteRow) -> str:
    """Return a site's loss in words."""
    return _course([(number, value) for number, value in enumerate(site.loss_R, start=1) if value is not None], "no loss yet")


def _course(values: Sequence[tuple[int, float]], nothing: str) -> str:
    if not values:
        return f"{nothing[:1].upper()}{nothing[1:]}."
    (first, begin), (final, end) = values[0], values[-1]
    course = "" if first == final else f", from {begin:.3f} in round {first}"
    return f"{end:.3f} in round {final}{course}."


def _heat(snapshot: Snapshot) -> dict[str, Any]:
    """Return usage per site and expert with a level of colour each; the darkest is the largest on the map."""
    rows = [site for site in snapshot.sites if len(site.usage_M) == len(snapshot.experts) and snapshot.experts]
    largest = max((value for site in rows for value in site.usage_M), default=0.0) or 1.0
    cells = [(site.name, [(value, round(HEAT_LEVELS * value / largest)) for value in site.usage_M]) for site in rows]
    most = [
        f"{name} uses {snapshot.experts[max(range(len(values)), key=lambda index: values[index][0])]} most"
        for name, values in cells
    ]
    return {"rows": cells, "largest": largest, "sentence": _listed(most, 8)}


def score(value: float | None) -> str:
    """Return a score with three digits, a dash where there is none."""
    return DASH if value is None else f"{value:.3f}"


def last(values: Sequence[float | None]) -> float | None:
    """Return the newest value that there is."""
    return next((value for value in reversed(values) if value is not None), None)


def size(value: int) -> str:
    """Return bytes as people read them, in powers of ten."""
    amount, units = float(value), ("bytes", "kB", "MB", "GB")
    for unit in units:
        if amount < 1000.0:
            return f"{amount:.0f} {unit}" if unit == "bytes" else f"{amount:.1f} {unit}"
        amount /= 1000.0
    return f"{amount:.1f} TB"


def duration(seconds: float) -> str:
    """Return seconds as people read them."""
    whole = round(seconds)
    if seconds < 10.0:
        return f"{seconds:.1f} s"
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    hours, rest = divmod(whole, 3600)
    return f"{hours} h {rest // 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def clock(moment: datetime) -> str:
    """Return a moment as people read it."""
    return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")

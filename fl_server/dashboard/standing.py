"""The sites of a study, one row each: who is in, who is late and until when, who is out and by which number."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import datetime

from fl_server.dashboard.snapshot import SiteRow, Standing
from fl_server.round_log import RoundRecord
from fl_server.waiting import Wait


def site_rows(
    names: Iterable[str],
    history: Sequence[RoundRecord],
    *,
    wait: Wait | None,
    out: Iterable[str],
    refused: Iterable[str],
    now: datetime,
) -> list[SiteRow]:
    """Return a row per site, by name.

    Parameters
    ----------
    names
        Sites of the consortium; those of the history and of the wait are added.
    history
        Records of the committed rounds.
    wait
        Of the run that lives; None where none does.
    out
        Sites that sit out.
    refused
        Site of each refusal.
    now
        Whether a wait is over follows from it.
    """
    everybody = {*names, *(name for record in history for name in record["sites"]), *(() if wait is None else wait.sites)}
    sitting, counts = set(out), Counter(refused)
    rows = []
    for name in sorted(everybody):
        standing = "sits out" if name in sitting else _at_rest(name, history) if wait is None else _standing(name, wait, now)
        row = _row(name, history, standing, counts[name])
        rows.append(row.model_copy(update={"until": wait.until}) if wait is not None and standing == "awaited" else row)
    return rows


def _standing(name: str, wait: Wait, now: datetime) -> Standing:
    """Return where a site stands in a live run."""
    late: Standing = "awaited" if now < wait.until else "overdue"
    if wait.kind == "connection":
        return late if name in wait.sites or not wait.sites else "not in this run"
    if name in wait.awaited:
        return late
    if name in wait.offline:
        return "not connected"
    # A site whose update of a former attempt is kept is not asked again.
    return "answered" if name in wait.sites else "not in this run"


def _at_rest(name: str, history: Sequence[RoundRecord]) -> Standing:
    if not any(name in record["sites"] for record in history):
        return "not in this run"
    return "took part" if name in history[-1]["sites"] else "missing"


def _row(name: str, history: Sequence[RoundRecord], standing: Standing, refused: int) -> SiteRow:
    found = [record["sites"].get(name) for record in history]
    used = [row for row in found if row is not None]
    last = history[-1]["faults"] if history and found[-1] is None else []
    return SiteRow(
        name=name,
        standing=standing,
        why=next((int(fault["number"]) for fault in last if fault["where"] == name), None),
        rounds_used=len(used),
        dice_R=tuple(None if row is None else row["val_dice"] for row in found),
        loss_R=tuple(None if row is None else row["loss"] for row in found),
        usage_M=tuple(used[-1]["usage"]) if used else (),
        bytes_up=sum(row["bytes_up"] for row in used),
        bytes_down=sum(row["bytes_down"] for row in used),
        refused=refused,
    )

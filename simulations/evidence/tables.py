"""The evidence as Markdown, drawn up from the files that the runs left; a run that is not there stands as not run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import TypeAdapter, ValidationError

from icmoe.atomic import write_atomically
from icmoe.errors import IcmoeError
from simulations.evidence.bars import (
    LOCAL,
    OURS,
    PERSONAL,
    PLAIN,
    POOLED,
    Bar,
    Rows,
    common_bars,
    dice_of,
    lacking,
    patients_unseen,
    seeds_of,
    site_means,
    unseen_bars,
)
from simulations.evidence.intervals import over_seeds
from simulations.evidence.patients import FILE, Score, damaged, read_record
from simulations.evidence.plan import PLANS, Plan

EVIDENCE = "evidence.md"
_SCORES = TypeAdapter(list[Score])
SHOWN = {
    LOCAL: "each site alone",
    OURS: "router-aware, one model for all",
    PLAIN: "FedAvg, one model for all",
    PERSONAL: "router-aware, then each site's own model",
    POOLED: "pooled data",
}


def write_tables(out: Path) -> Path:
    """Write evidence.md of everything below `out` and return its path."""
    text = ["# Evidence", "", "Drawn up by `python -m simulations.evidence tables`; Dice per patient on `test`.", ""]
    for plan in PLANS.values():
        text += section(plan, out)
    path = out / EVIDENCE
    write_atomically(path, ("\n".join(text).rstrip() + "\n").encode())
    return path


def section(plan: Plan, out: Path) -> list[str]:
    """Return the lines of one plan."""
    found = {run.name: read for run in plan.runs if (read := _read(out / run.name / FILE)) is not None}
    lines = [f"## {plan.title}", ""]
    missing = [run.name for run in plan.runs if run.name not in found]
    if missing:
        lines += [f"Not run: {', '.join(missing)}.", ""]
    for run in plan.runs:
        if run.name not in found or run.held_out:
            continue
        record = found[run.name]
        rows = record["scores"]
        lines += [f"### {run.name}", "", _stamp(record, rows), "", *score_table(rows), ""]
        if gaps := lacking(rows) if plan.claims else []:
            lines += [f"Methods are not compared, since scores are missing: {'; '.join(gaps)}.", ""]
        bars = _common(plan, record) if plan.claims and not gaps else []
        if run is plan.runs[0]:
            told, unseen = _unseen(plan, found)
            lines, bars = lines + told, bars + unseen
        if bars or not plan.claims:
            lines += [*bar_table(bars), ""] if bars else ["Too few patients for claims.", ""]
    return lines


def _common(plan: Plan, record: Mapping[str, Any]) -> list[Bar]:
    try:
        exponent = float(record["configuration"]["study"]["aggregation"]["usage_exponent"])
    except (KeyError, TypeError, ValueError):
        exponent = None
    return common_bars(record["scores"], mean_gain=plan.mean_gain, usage_exponent=exponent)


def _unseen(plan: Plan, found: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[Bar]]:
    """Return where each run without a hospital is from, and the bars of those that the first run can be compared with."""
    base, alike, lines = found[plan.runs[0].name], {}, list[str]()
    for run in (run for run in plan.runs if run.held_out and run.name in found):
        record = found[run.name]
        other = _differs(base, record, run.held_out)
        if not other:
            alike[run.held_out] = record["scores"]
        verdict = f" Not compared with {plan.runs[0].name}: other {', '.join(other)}." if other else ""
        lines += [f"{run.name}: {_stamp(record, record['scores'])}{verdict}", ""]
    return lines, unseen_bars(base["scores"], alike, [run.held_out for run in plan.runs if run.held_out])


def _differs(base: Mapping[str, Any], other: Mapping[str, Any], site: str) -> list[str]:
    """Return what a run without a site must share with the run of all and does not; their data digests cannot be alike."""
    found = [name for name in ("study", "backbone") if base[f"{name}_digest"] != other[f"{name}_digest"]]
    if base.get("scored_data") != other.get("scored_data"):
        found.append("data")
    same = patients_unseen(base["scores"], LOCAL, site) == patients_unseen(other["scores"], OURS, site)
    return found if same else [*found, "patients"]


def _read(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    record = read_record(path, "commit", "study_digest", "data_digest", "backbone_digest", "scores")
    try:
        _SCORES.validate_json(json.dumps(record["scores"]), strict=True)
    except ValidationError:
        raise IcmoeError(damaged(path)) from None
    return record


def _stamp(record: Mapping[str, Any], rows: Rows) -> str:
    digests = ", ".join(f"{name} `{record[f'{name}_digest'][:12]}`" for name in ("study", "data", "backbone"))
    scored = record.get("scored_by", record["commit"])
    commits = f"`{record['commit']}`" + ("" if scored == record["commit"] else f", scored by `{scored}`")
    return f"Commit {commits}, {digests}, seeds {', '.join(map(str, seeds_of(rows)))}."


def score_table(rows: Rows) -> list[str]:
    """Return Dice by method and site, mean over seeds, with the t-interval of the mean of sites."""
    seeds = seeds_of(rows)
    present = [name for name in SHOWN if any(row["method"] == name for row in rows)]
    found = {name: [site_means(dice_of(rows, name, seed, own=name in (LOCAL, PERSONAL))) for seed in seeds] for name in present}
    means = {name: kept for name, every in found.items() if (kept := [one for one in every if one])}
    sites = sorted({site for every in means.values() for one in every for site in one})
    lines = _row("method", *sites, "mean of sites", "over seeds, 95%") + _row("---", *["---:"] * (len(sites) + 2))
    for name in means:
        at = {site: [one[site] for one in means[name] if site in one] for site in sites}
        cells = [f"{fmean(values):.3f}" if values else "-" for values in at.values()]
        whole = over_seeds([fmean(one.values()) for one in means[name]])
        spread = "-" if whole.low is None else f"{whole.low:.3f} to {whole.high:.3f}"
        lines += _row(SHOWN[name], *cells, f"{whole.mean:.3f}", spread)
    return lines


def bar_table(bars: Iterable[Bar]) -> list[str]:
    """Return one line per question: value, both intervals, bar, verdict."""
    lines = _row("question", "mean [t-interval over seeds]", "[t-interval over patients]", "bar", "") + _row(
        "---", "---:", "---:", "---:", "---"
    )
    for bar in bars:
        patients = (
            "-" if bar.patients is None or bar.patients.low is None else f"[{bar.patients.low:+.3f}, {bar.patients.high:+.3f}]"
        )
        wanted = "-" if bar.bar is None else f"{bar.bar:+.2f}"
        verdict = {None: "", True: "met", False: "**not met**"}[bar.met]
        lines += _row(bar.question, str(bar.seeds), patients, wanted, verdict)
    return lines


def _row(*cells: str) -> list[str]:
    return [f"| {' | '.join(cells)} |"]

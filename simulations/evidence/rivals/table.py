"""The table of rivals: Dice per site beside what each costs; what was not run says so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from icmoe.atomic import write_atomically
from icmoe.config import parse
from icmoe.model import build_model
from icmoe.study import Study
from simulations.evidence.rivals.catalogue import METHODS
from simulations.evidence.rivals.origin import require_one_origin
from simulations.evidence.rivals.records import read_ours, read_rival
from simulations.evidence.rivals.regimes import REGIMES
from simulations.evidence.rivals.segmenter import trained_count
from simulations.results import summary_of

Record = dict[str, Any]
OURS = {
    "router-aware": "router-aware",
    "fedavg": "plain averages",
    "personal": "personal",
    "pooled": "pooled",
    "local": "each site alone",
}
NOTES = (
    "Dice is the mean over the site's test patients, each scored as a volume; the mean is that of the sites; after ± stands the "
    "standard deviation over the seeds. For sites alone and Ditto it is each site's own model on its own test, otherwise one "
    "model on all tests. Bytes are the float32 tensors that one site sends in one round; as many come back. Core-seconds are "
    "those of training, all rounds and sites together, one seed; encoding the frozen part once is not in them. For IC-MoE as "
    "released they are seconds on the clock of its sites, one thread each, so that a busy machine adds to them. Memory is the "
    "process's peak during training. A row of the second table says what that few rounds give, and is no verdict on the "
    "method. Learning rates were not tuned; encoders that are fine-tuned have a tenth of the study's."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One method in one regime.

    Parameters
    ----------
    title, regime
        As shown.
    ours
        Whether it is IC-MoE as released.
    seeds
        How many stand behind it; 0 where it was not run.
    rounds
        Behind the figures; None where it was not run.
    short
        Whether these are fewer than the study's.
    parameters, bytes_each_way, cpu_s, peak_mb
        Cost; None where not known.
    dice
        Mean over the seeds per site.
    mean, spread
        Mean of sites over the seeds and its standard deviation; None where there is none.
    """

    title: str
    regime: str
    ours: bool = False
    seeds: int = 0
    rounds: int | None = None
    short: bool = False
    parameters: int | None = None
    bytes_each_way: float | None = None
    cpu_s: float | None = None
    peak_mb: float | None = None
    dice: Mapping[str, float] | None = None
    mean: float | None = None
    spread: float | None = None


def read_rows(folder: Path, ours: Path | None) -> list[Row]:
    """Return IC-MoE's rows, then a row for every method and regime of the catalogue, run or not, then the short runs.

    Parameters
    ----------
    folder
        Where `run` left its results.
    ours
        results.json of a rehearsal of IC-MoE.

    Raises
    ------
    IcmoeError
        205 where `ours` is not there, 217 where it is damaged; 525 where a rival's record is; 526 where the results, `ours`
        among them, were not made on one study, one set of data and one backbone.
    """
    records = [read_rival(path) for path in sorted((folder / "results").glob("*.json"))]
    results = None if ours is None else read_ours(ours)
    require_one_origin(records, results)
    rows = [] if results is None else _rows_of_ours(results, where=str(ours))
    found: dict[tuple[str, str, int | None], list[Record]] = {}
    for record in records:
        found.setdefault((record["method"], record["regime"], record["rounds"] if record["short"] else None), []).append(record)
    short = sorted({rounds for _, _, rounds in found if rounds is not None})
    pairs = [(name, regime) for name, method in METHODS.items() for regime in method.regimes]
    rows += [_row(name, regime, found.get((name, regime, None), [])) for name, regime in pairs]
    return rows + [_row(*pair, found[*pair, rounds]) for rounds in short for pair in pairs if (*pair, rounds) in found]


def _row(method: str, way: str, records: Sequence[Record]) -> Row:
    title, regime = METHODS[method].title, REGIMES[way].title
    if not records:
        return Row(title=title, regime=regime)
    first = records[0]
    return Row(
        title=title,
        regime=regime,
        seeds=len(records),
        rounds=first["rounds"],
        short=first["short"],
        parameters=first["parameters"],
        bytes_each_way=first["bytes_each_way"],
        cpu_s=fmean(record["cpu_s"] for record in records),
        peak_mb=max(record["peak_mb"] for record in records),
        **_dice([record["own_test"] or record["test"] for record in records]),
    )


def _dice(tests: Sequence[Record]) -> dict[str, Any]:
    found = summary_of([{"test": test} for test in tests])
    return {
        "dice": {name: row["mean"] for name, row in found["per_site"].items() if row["mean"] is not None},
        "mean": found["dice_mean"],
        "spread": found["dice_mean_std"],
    }


def _rows_of_ours(results: Record, *, where: str) -> list[Row]:
    study = parse(Study, results["configuration"]["study"], where=where)
    parameters = trained_count(build_model(study, seed=0))
    rows = []
    for method, title in OURS.items():
        runs = list(results["methods"].get(method, {}).values())
        if not runs:
            continue
        last = runs[0]["rounds"][-1]
        seconds = [sum(site["seconds"] for row in run["rounds"] for site in row["sites"].values()) for run in runs]
        rows.append(
            Row(
                title="IC-MoE as released",
                regime=title,
                ours=True,
                seeds=len(runs),
                parameters=parameters,
                bytes_each_way=last["bytes_up"] / len(last["sites"]),
                cpu_s=fmean(seconds),
                rounds=study.rounds,
                **_dice([run["own_test"] or run["test"] for run in runs]),
            )
        )
    return rows


def write_table(folder: Path, rows: Sequence[Row]) -> None:
    """Write rivals.md: the study's rounds, then the short runs if there are any."""
    full, short = ([row for row in rows if row.short == kind] for kind in (False, True))
    sites = sorted({site for row in rows for site in row.dice or ()})
    parts = [_table(full, sites), *([f"With fewer rounds:\n\n{_table(short, sites)}"] if short else []), NOTES]
    write_atomically(folder / "rivals.md", ("\n\n".join(parts) + "\n").encode())


def _table(rows: Sequence[Row], sites: Sequence[str]) -> str:
    heads = [
        "method",
        "trained",
        "parameters",
        "bytes per round",
        "core-s",
        "memory, MB",
        "rounds",
        "seeds",
        *sites,
        "mean of sites",
    ]
    lines = [heads, ["---", "---", *["---:"] * (len(heads) - 2)], *(_cells(row, sites) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cells(row: Row, sites: Sequence[str]) -> list[str]:
    if row.mean is None:
        return [row.title, row.regime, *["-"] * (6 + len(sites)), "not run"]
    spread = "" if row.spread is None else f" ± {row.spread:.3f}"
    costs = [_number(value) for value in (row.parameters, row.bytes_each_way, row.cpu_s, row.peak_mb, row.rounds)]
    each = [f"{row.dice[site]:.3f}" if row.dice and site in row.dice else "-" for site in sites]
    return [row.title, row.regime, *costs, str(row.seeds), *each, f"{row.mean:.3f}{spread}"]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"

"""Each model on each site's test patients: the matrix of a rehearsal, from scores that are there already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from simulations.findings import Results, method_name

Record = dict[str, Any]
MEAN = "mean of sites"


def dice_by_site(test: Record) -> dict[str, float | None]:
    """Return the Dice at each site of a test record: a row of the matrix."""
    return {name: row["dice"] for name, row in test["sites"].items()}


def cross_site(methods: Mapping[str, Mapping[str, Record]], sites: Sequence[str]) -> list[Record]:
    """Return a row per model: Dice on each site's test patients and their mean, each with its spread over the seeds.

    Parameters
    ----------
    methods
        By method and seed: `test`, and `by_site` where each site has a model of its own.
    sites
        In the order of the columns.

    Returns
    -------
    list[Record]
        `method`, `site` (whose model it is; null for one model for all), `dice` by site and `mean` over the sites that have
        test patients, both as `mean` and `std`; null where nothing was scored, and no spread with one seed.
    """
    rows: list[Record] = []
    for method, by_seed in methods.items():
        runs = list(by_seed.values())
        owners = list(runs[0].get("by_site", {})) if runs else []
        if runs and "models" not in runs[0]:  # one model for all, which a mean over models is not
            rows.append(_row(method, None, [dice_by_site(run["test"]) for run in runs], sites))
        rows += [_row(method, owner, [run["by_site"][owner] for run in runs], sites) for owner in owners]
    return rows


def matrix(results: Results) -> tuple[list[str], list[str], list[list[Record]]]:
    """Return names of the models, names of the columns, and the scores, as `cross_site` gives them."""
    found = results.get("cross_site", [])
    sites = [site for site in (found[0]["dice"] if found else {}) if any(row["dice"][site]["mean"] is not None for row in found)]
    names = [method_name(row["method"]) + (f" of {row['site']}" if row["site"] else "") for row in found]
    return names, [*sites, MEAN], [[*(row["dice"][site] for site in sites), row["mean"]] for row in found]


def matrix_rows(results: Results) -> tuple[list[str], list[tuple[str, ...]]]:
    """Return the columns and rows of the matrix as texts."""
    names, columns, scores = matrix(results)
    return columns, [(name, *map(_text, row)) for name, row in zip(names, scores, strict=True)]


def _row(method: str, owner: str | None, seeds: Sequence[Mapping[str, float | None]], sites: Sequence[str]) -> Record:
    means = [fmean(known) for seed in seeds if (known := [value for value in seed.values() if value is not None])]
    dice = {site: _spread([seed.get(site) for seed in seeds]) for site in sites}
    return {"method": method, "site": owner, "dice": dice, "mean": _spread(means)}


def _spread(values: Sequence[float | None]) -> Record:
    known = [value for value in values if value is not None]
    return {"mean": fmean(known) if known else None, "std": stdev(known) if len(known) > 1 else None}


def _text(score: Record) -> str:
    if score["mean"] is None:
        return "\N{EN DASH}"
    return f"{score['mean']:.3f}" + ("" if score["std"] is None else f" ± {score['std']:.3f}")

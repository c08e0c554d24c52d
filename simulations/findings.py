"""What the numbers of a simulation say: means over seeds, curves, the final table and the answer to "worth it?".

Everything here is a pure function of the results (schema version 1). A value that is absent, null or not finite is None and
is left out of means; it is never counted as zero.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from icmoe.server_privacy import spending_sentence

Results = Mapping[str, Any]

METHOD_NAMES = {
    "router-aware": "Router-aware",
    "fedavg": "FedAvg",
    "fedprox": "FedProx",
    "fedadam": "FedAdam",
    "fedyogi": "FedYogi",
    "personal": "Personal",
    "personalised": "Personalised",
    "local": "Local",
    "pooled": "Pooled",
}
"""Methods in the order of every table and legend; others follow by name."""

ALONE = ("local", "pooled", "personalised")
"""Methods without any exchange between sites; the engine's own traffic for them means nothing."""

MATTERS_POINTS = 0.5
"""Dice points below which a difference is called too small to matter, however often it recurs."""

EVEN_USE_SPREAD = 0.02
"""Spread of usage between sites below which router-aware weights are FedAvg's in practice."""


@dataclass(frozen=True, slots=True)
class Point:
    """One round of a curve.

    Parameters
    ----------
    round
        Number of the round, from 1.
    mean, low, high
        Mean, least and largest value over the seeds.
    """

    round: int
    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Estimate:
    """A score over the seeds.

    Parameters
    ----------
    mean
        None where no seed has a value.
    deviation
        Standard deviation between seeds; None with fewer than two.
    """

    mean: float | None
    deviation: float | None


@dataclass(frozen=True, slots=True)
class Finding:
    """A question, its answer and the numbers behind it."""

    question: str
    answer: Literal["yes", "no", "not shown"]
    sentence: str


def number(value: object) -> float | None:
    """Return `value` as a finite float, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are there, or None."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def estimate(values: Sequence[float | None]) -> Estimate:
    """Return mean and standard deviation (n - 1) of one value per seed."""
    known = [value for value in values if value is not None]
    return Estimate(mean(known), statistics.stdev(known) if len(known) > 1 else None)


def method_name(method: str) -> str:
    """Return the method's name as tables show it."""
    return METHOD_NAMES.get(method, method)


def methods(results: Results) -> list[str]:
    """Return the methods that ran, in the order of `METHOD_NAMES`."""
    order = list(METHOD_NAMES)
    return sorted(results.get("methods", {}), key=lambda name: (order.index(name) if name in order else len(order), name))


def sites(results: Results) -> list[str]:
    """Return the names of all sites, sorted."""
    return sorted(results.get("sites", {}))


def runs(results: Results, method: str) -> list[Mapping[str, Any]]:
    """Return the method's runs, one per seed, in the order of the seeds."""
    by_seed = results.get("methods", {}).get(method, {})
    return [by_seed[seed] for seed in sorted(by_seed, key=lambda seed: (len(seed), seed))]


def round_value(entry: Mapping[str, Any], key: str) -> float | None:
    """Return the mean of a round's value over its sites, as it is of local models too; its own where sites have none."""
    of_sites = mean(number(site.get(key)) for site in entry.get("sites", {}).values())
    return of_sites if of_sites is not None else number(entry.get(key))


def curve(results: Results, method: str, key: str) -> list[Point]:
    """Return a value of each round over the seeds; rounds without any value are left out."""
    by_round: dict[int, list[float]] = {}
    for run in runs(results, method):
        for entry in run.get("rounds", []):
            if (value := round_value(entry, key)) is not None:
                by_round.setdefault(int(entry["round"]), []).append(value)
    return [Point(at, math.fsum(v) / len(v), min(v), max(v)) for at, v in sorted(by_round.items())]


def total(results: Results, method: str, *path: str) -> float | None:
    """Return the sum over the rounds of the value at `path`, such as ("seconds", "train"), averaged over the seeds."""
    sums = []
    for run in runs(results, method):
        known = [value for entry in run.get("rounds", []) if (value := _at(entry, path)) is not None]
        sums.append(math.fsum(known) if known else None)
    return mean(sums)


def common_methods(results: Results) -> list[str]:
    """Return the methods whose models were scored on every site's patients."""
    return [method for method in methods(results) if method != "personalised"]


def own_methods(results: Results) -> list[str]:
    """Return the methods that scored each site's own model on its own patients."""
    return [method for method in methods(results) if any(run.get("own_test") for run in runs(results, method))]


def site_estimate(results: Results, method: str, site: str, key: str, *, part: str = "test") -> Estimate:
    """Return a site's test score over the seeds; `part` is "test" or "own_test"."""
    return estimate([number(_site_table(run, part).get(site, {}).get(key)) for run in runs(results, method)])


def over_sites(results: Results, method: str, key: str, *, part: str = "test") -> Estimate:
    """Return the mean over the sites that have the score, each counting once."""
    tables = [_site_table(run, part).values() for run in runs(results, method)]
    return estimate([mean(number(site.get(key)) for site in table) for table in tables])


def worst_site(results: Results, method: str, *, part: str = "test") -> Estimate:
    """Return the Dice of the worst site of each seed, over the seeds."""
    tables = [[number(site.get("dice")) for site in _site_table(run, part).values()] for run in runs(results, method)]
    return estimate([min((dice for dice in table if dice is not None), default=None) for table in tables])


def over_patients(results: Results, method: str, *, part: str = "test", only: Sequence[str] | None = None) -> dict[str, float]:
    """Return the mean Dice over the patients of all sites, or of the sites in `only`, per seed that has one."""
    values = {}
    for seed, run in results.get("methods", {}).get(method, {}).items():
        scored = [
            (dice, int(site.get("patients", 1)))
            for name, site in _site_table(run, part).items()
            if (only is None or name in only) and (dice := number(site.get("dice"))) is not None
        ]
        if scored:
            values[seed] = math.fsum(dice * count for dice, count in scored) / sum(count for _, count in scored)
    return values


def last_usage(results: Results) -> tuple[str, list[str], list[list[float]]] | None:
    """Return method, sites and usage (sites x experts, rows on the simplex) of the last round, averaged over seeds.

    Router-aware where it ran, else the first method whose sites report usage; None where none does.
    """
    for method in methods(results):
        ends = [run["rounds"][-1].get("sites", {}) for run in runs(results, method) if run.get("rounds")]
        rows = {}
        for site in sorted({name for end in ends for name in end}):
            shares = [end[site]["usage"] for end in ends if end.get(site, {}).get("usage")]
            if shares:
                rows[site] = [math.fsum(column) / len(column) for column in zip(*shares, strict=True)]
        if rows:
            return method, list(rows), list(rows.values())
    return None


def worth_it(results: Results) -> list[Finding]:
    """Return what router-aware training gained over each site alone, over FedAvg and against pooled data.

    Dice is the mean over test patients. A difference counts only if it has the same sign in each of at least two seeds and
    is at least `MATTERS_POINTS` large on average; methods share their draws, so seeds are compared in pairs.
    """
    ours = over_patients(results, "router-aware")
    if not ours:
        return [Finding("Is it worth it?", "not shown", "Router-aware training has no test score in this run.")]
    own = over_patients(results, "local", part="own_test")
    own_sites = [
        name for name in sites(results) if site_estimate(results, "local", name, "dice", part="own_test").mean is not None
    ]
    at_home = over_patients(results, "router-aware", only=own_sites)
    home = _compared("Is training together worth it for a hospital's own patients?", "each site's own model", at_home, own)
    if home is not None:
        home = replace(home, sentence=f"{home.sentence} {_sites_better(results, own_sites)}")
    abroad = _compared(
        "And for patients from anywhere?",
        "the sites' own models, each used at every site,",
        ours,
        over_patients(results, "local"),
    )
    usage = _compared("Is weighing by router usage worth it?", "plain FedAvg", ours, over_patients(results, "fedavg"))
    return [finding for finding in (home, abroad, usage) if finding is not None]


def remarks(results: Results) -> list[str]:
    """Return what a reader must know before quoting a number."""
    lines = []
    ours, pooled = (mean(over_patients(results, name).values()) for name in ("router-aware", "pooled"))
    if ours is not None and pooled and not results.get("comparisons"):
        lines.append(f"Router-aware reaches {ours / pooled:.3f} of the Dice of pooled training, which hospitals may not do.")
    spread = curve(results, "router-aware", "usage_spread")
    if spread and spread[-1].mean < EVEN_USE_SPREAD:
        lines.append(
            f"Sites used the experts almost alike (spread {spread[-1].mean:.3f}), so router-aware weights are close to FedAvg's."
        )
    for method in methods(results):
        spent = [run["rounds"][-1]["privacy"] for run in runs(results, method) if run.get("rounds") and _is_private(run)]
        if spent:
            line = f"What the models of {method} promise to each site: {spending_sentence(spent[0])}."
            lines.append(f"{line} Losses, usage and scores of single sites below are not covered by it.")
    patients = [count for site in results.get("sites", {}).values() if (count := site.get("patients", {}).get("test", 0))]
    if patients:
        each = f"{min(patients)} to {max(patients)}" if min(patients) < max(patients) else f"{min(patients)}"
        lines.append(f"The test has {sum(patients)} patients, {each} at each of {len(patients)} sites.")
    if results.get("phantoms"):
        lines.append("Phantoms are drawings: they show that the machinery works and say nothing about patients.")
    if results.get("test_only"):
        lines.append("The backbone is a seeded stand-in for tests; its scores mean nothing.")
    return lines


def _is_private(run: Mapping[str, Any]) -> bool:
    return bool(run["rounds"][-1].get("privacy"))


def _sites_better(results: Results, names: Sequence[str]) -> str:
    better = 0
    for name in names:
        ours = site_estimate(results, "router-aware", name, "dice").mean
        own = site_estimate(results, "local", name, "dice", part="own_test").mean
        better += ours is not None and own is not None and ours > own
    return f"The shared model is the better one at {better} of {len(names)} sites."


def _site_table(run: Mapping[str, Any], part: str) -> Mapping[str, Any]:
    """Return scores by site; "own_test" may hold them directly or as a whole evaluation record."""
    table: Mapping[str, Any] = run.get(part) or {}
    sites_of: Mapping[str, Any] = table.get("sites", table if part == "own_test" else {})
    return sites_of


def _at(entry: Mapping[str, Any], path: Sequence[str]) -> float | None:
    value: Any = entry
    for key in path:
        value = (value or {}).get(key)
    return number(value)


def _compared(question: str, other: str, ours: Mapping[str, float], theirs: Mapping[str, float]) -> Finding | None:
    seeds = sorted(set(ours) & set(theirs))
    if not seeds:
        return None
    points = [100 * (ours[seed] - theirs[seed]) for seed in seeds]
    gain = math.fsum(points) / len(points)
    sentence = (
        f"Router-aware has a mean Dice of {mean(ours[seed] for seed in seeds):.3f}, {other} "
        f"{mean(theirs[seed] for seed in seeds):.3f}: {gain:+.1f} points"
    )
    if len(points) == 1:
        return Finding(question, "not shown", f"{sentence}. One seed cannot tell an effect from chance.")
    sentence += f" ({min(points):+.1f} to {max(points):+.1f} over {len(points)} seeds)"
    if min(points) <= 0 <= max(points):
        return Finding(question, "not shown", f"{sentence}. The sign differs between seeds.")
    if abs(gain) < MATTERS_POINTS:
        return Finding(question, "not shown", f"{sentence}. Less than {MATTERS_POINTS} points is too small to matter.")
    return Finding(question, "yes" if gain > 0 else "no", f"{sentence}.")

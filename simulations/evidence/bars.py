"""What the scores say to the questions that decide the product: each with its bar, and whether it is met. Pure.

A score of a site is the mean Dice of its test patients; of a method, the mean of its sites unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from simulations.evidence.intervals import Interval, over_patients, over_seeds

Rows = Sequence[Mapping[str, Any]]
"""`scores` of patients.json."""
Patients = dict[tuple[str, str], float]
"""Dice by (site, patient)."""
OURS, PLAIN, PERSONAL, LOCAL, POOLED = "router-aware", "fedavg", "personalised", "local", "pooled"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A question with its answer.

    Parameters
    ----------
    question
        In words.
    seeds
        Value with its interval over seeds.
    patients
        The same value with its interval over patients, where it is a paired difference.
    bar
        Least value that is wanted; None where the question is open.
    """

    question: str
    seeds: Interval
    patients: Interval | None = None
    bar: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the mean reaches the bar."""
        return None if self.bar is None else self.seeds.mean >= self.bar


def seeds_of(rows: Rows) -> list[int]:
    """Return the seeds that were scored."""
    return sorted({row["seed"] for row in rows})


def dice_of(rows: Rows, method: str, seed: int, *, own: bool = False) -> Patients:
    """Return the test patients' Dice by one model, or, with `own`, by the model of each patient's own site."""
    return {
        (row["site"], row["patient"]): row["dice"]
        for row in rows
        if row["method"] == method and row["seed"] == seed and row["split"] == "test"
        if row["trained_at"] == (row["site"] if own else "")
    }


def by_site(patients: Patients) -> dict[str, list[float]]:
    """Return the values of each site's patients."""
    found: dict[str, list[float]] = {}
    for (site, _), value in sorted(patients.items()):
        found.setdefault(site, []).append(value)
    return found


def site_means(patients: Patients) -> dict[str, float]:
    """Return the mean of each site."""
    return {site: fmean(values) for site, values in by_site(patients).items()}


def mean_of_sites(patients: Patients) -> float:
    """Return the mean over sites of the mean over their patients."""
    return fmean(site_means(patients).values())


def difference(rows: Rows, ours: Callable[[int], Patients], theirs: Callable[[int], Patients]) -> tuple[Interval, Interval]:
    """Return ours minus theirs, mean of sites, with intervals over seeds and over patients.

    Parameters
    ----------
    rows
        For the seeds.
    ours, theirs
        Dice of the same patients by seed.
    """
    seeds = seeds_of(rows)
    return paired([ours(seed) for seed in seeds], [theirs(seed) for seed in seeds])


def paired(ours: Sequence[Patients], theirs: Sequence[Patients]) -> tuple[Interval, Interval]:
    """Return what `difference` does, of the Dice of the same patients, one table per seed, at least one."""
    gains = [{key: mine[key] - other[key] for key in mine} for mine, other in zip(ours, theirs, strict=True)]
    means = [mean_of_sites(gain) for gain in gains]
    each = {key: fmean(gain[key] for gain in gains) for key in gains[0]}
    return over_seeds(means), over_patients(by_site(each))


def lacking(rows: Rows) -> list[str]:
    """Return what keeps methods from being compared: seeds and patients that one of them lacks and another one has."""
    found: list[str] = []
    for names, own in (((PERSONAL, LOCAL), True), ((OURS, PLAIN, POOLED), False)):
        scored = {(name, seed): set(dice_of(rows, name, seed, own=own)) for name in names for seed in seeds_of(rows)}
        everybody = set().union(*scored.values())
        found += [
            f"{name} with seed {seed} ({len(patients)} of {len(everybody)} test patients)"
            for (name, seed), patients in scored.items()
            if not patients or patients != everybody
        ]
    return found


def common_bars(rows: Rows, *, mean_gain: float, usage_exponent: float | None = None) -> list[Bar]:
    """Return the bars of a set whose hospitals all took part.

    Parameters
    ----------
    rows
        Scores of one rehearsal; `lacking` names nothing in them.
    mean_gain
        Dice by which the sites' own models shall beat local ones, mean of sites.
    usage_exponent
        t of the router-aware study; None where it is not known.
    """
    seeds = seeds_of(rows)

    def per_seed(value: Callable[[int], float]) -> Interval:
        return over_seeds([value(seed) for seed in seeds])

    def least_gain(seed: int) -> float:
        own, alone = (site_means(dice_of(rows, name, seed, own=True)) for name in (PERSONAL, LOCAL))
        return min(value - alone[site] for site, value in own.items())

    weights = "" if usage_exponent is None else f" (t={usage_exponent:g})"
    gain = difference(rows, lambda s: dice_of(rows, PERSONAL, s, own=True), lambda s: dice_of(rows, LOCAL, s, own=True))
    usage = difference(rows, lambda s: dice_of(rows, OURS, s), lambda s: dice_of(rows, PLAIN, s))
    return [
        Bar(question="site that gains least: own model minus local", seeds=per_seed(least_gain), bar=-0.01),
        Bar(question="own models minus local, mean of sites", seeds=gain[0], patients=gain[1], bar=mean_gain),
        *_share_of_pooled(rows),
        Bar(
            question="worst site: router-aware minus FedAvg",
            seeds=per_seed(lambda s: _worst(dice_of(rows, OURS, s)) - _worst(dice_of(rows, PLAIN, s))),
            bar=0.0,
        ),
        Bar(question=f"router-aware{weights} minus FedAvg, mean of sites", seeds=usage[0], patients=usage[1]),
    ]


def _share_of_pooled(rows: Rows) -> list[Bar]:
    """Return the bar on the share of pooled training that the global model reaches; none where pooled training scores 0."""
    ours, pooled = ([fmean(dice_of(rows, method, seed).values()) for seed in seeds_of(rows)] for method in (OURS, POOLED))
    if min(pooled) == 0.0:
        return []
    shares = over_seeds([mine / most for mine, most in zip(ours, pooled, strict=True)])
    return [Bar(question="global model as a share of pooled training, all patients", seeds=shares, bar=0.98)]


def _worst(patients: Patients) -> float:
    return min(site_means(patients).values())


def unseen_bars(base: Rows, held_out: Mapping[str, Rows], planned: Collection[str] = ()) -> list[Bar]:
    """Return, per hospital left out and for their mean, the federation's model minus the best single hospital's.

    All patients of the hospital count, since neither model saw one of them. The best single hospital is chosen on the
    very patients that are scored, in its favour. Seeds count that all of these rehearsals have.

    Parameters
    ----------
    base
        Scores of the rehearsal with all hospitals: its local models.
    held_out
        Scores of the rehearsals without one, by its name.
    planned
        Hospitals that shall be left out; while one is missing, the mean has no bar, for it would depend on which are there.
    """
    gains: dict[str, list[float]] = {}
    seeds = [
        seed
        for seed in seeds_of(base)
        if all(_unseen(rows, OURS, seed, name).get("") and _unseen(base, LOCAL, seed, name) for name, rows in held_out.items())
    ]
    for name, rows in sorted(held_out.items()):
        for seed in seeds:
            ours = fmean(_unseen(rows, OURS, seed, name)[""].values())
            best = max(fmean(found.values()) for found in _unseen(base, LOCAL, seed, name).values())
            gains.setdefault(name, []).append(ours - best)
    if not gains:
        return []
    bars = [
        Bar(question=f"unseen hospital {name}: router-aware minus the best single hospital's model", seeds=over_seeds(values))
        for name, values in gains.items()
    ]
    means = [fmean(values) for values in zip(*gains.values(), strict=True)]
    if missing := sorted(set(planned) - set(gains)):
        return [*bars, Bar(question=f"unseen hospital, mean, {', '.join(missing)} missing", seeds=over_seeds(means))]
    return [*bars, Bar(question="unseen hospital, mean", seeds=over_seeds(means), bar=0.05)]


def patients_unseen(rows: Rows, method: str, site: str) -> set[tuple[str, str]]:
    """Return which patients of a site, each with its split, a method's models were scored on that never saw the site."""
    return {
        (row["patient"], row["split"])
        for row in rows
        if (row["method"], row["site"]) == (method, site) and row["trained_at"] != site
    }


def _unseen(rows: Rows, method: str, seed: int, site: str) -> dict[str, dict[str, float]]:
    """Return Dice of all patients of a site by each model that never saw it, by where the model was trained."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        if (row["method"], row["seed"], row["site"]) == (method, seed, site) and row["trained_at"] != site:
            found.setdefault(row["trained_at"], {})[row["patient"]] = row["dice"]
    return found

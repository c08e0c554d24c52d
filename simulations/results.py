"""`results.json` of a rehearsal, schema version 1 (documented in simulations/README.md)."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from statistics import fmean, stdev
from typing import Any

import torch

from icmoe import __version__
from icmoe.accounting import study_epsilon, training_spending
from icmoe.data.slices import SiteData
from icmoe.data.splits import SPLITS
from icmoe.kinds import names_of
from icmoe.study import Study
from simulations.cross_site import cross_site
from simulations.hospitals import Hospitals
from simulations.scenario import Simulation

SCHEMA_VERSION = 1
Record = dict[str, Any]


def site_record(site: SiteData) -> Record:
    """Return what was found and used of a site."""
    splits = {name: site.of(name) for name in SPLITS}
    return {
        "images_found": site.images_found,
        "images_used": site.images_used,
        # A virtual site may hold patients of several hospitals, whose pseudonyms may be alike.
        "patients": {name: len({(item.site, item.patient) for item in rows}) for name, rows in splits.items()},
        "slices": {name: len(rows) for name, rows in splits.items()},
        "exclusions": [fault.record() for fault in site.exclusions],
    }


CHECK_COLUMNS = ("site", "images", "patients", "modality", "pixel mm", "slice mm", "side px", "images per class")


def check_rows(check: Record) -> list[tuple[str, ...]]:
    """Return the rows of a data check for people, one per site; a dash is what was withheld or is not known."""
    return [
        (
            name,
            _at_most(summary["images"]),
            _at_most(summary["patients"]),
            ", ".join(summary["modalities"]) or "-",
            *(_ends(summary[key]) for key in ("in_plane_mm", "between_mm", "side_px")),
            ", ".join(_at_most(label["images"]) for label in summary["labels"]) or "-",
        )
        for name, summary in check["summaries"].items()
    ]


def _at_most(count: int | None) -> str:
    return "-" if count is None else f"<= {count}"


def _ends(ends: Sequence[float] | None) -> str:
    return "-" if ends is None else "-".join(f"{value:g}" for value in dict.fromkeys(ends))


def versions() -> dict[str, str]:
    """Return the versions that took part."""
    names = ("torch", "flwr", "ray", "segment-anything", "monai", "numpy", "safetensors")
    return {"icmoe-federated": __version__, "python": platform.python_version(), **{name: version(name) for name in names}}


def results_record(
    *,
    study: Study,
    simulation: Simulation,
    hospitals: Hospitals,
    backbone: Record,
    methods: Mapping[str, Mapping[str, Record]],
    data_check: Record,
    expert_use: Record | None,
    seconds: Mapping[str, float],
    created: str,
    commit: str,
) -> Record:
    """Return the whole record.

    Parameters
    ----------
    study
        The router-aware study that all methods were derived from.
    simulation, hospitals
        What was rehearsed, where.
    backbone
        Name, digest, weights digest before and after.
    methods
        By method and seed: rounds, test, own_test, model.
    data_check
        As `fl_server.data_check` writes it.
    expert_use
        From `simulations.expert_use`, of the first federated method and seed.
    seconds
        By phase.
    created
        ISO 8601.
    commit
        Of the code that trained last.
    """
    summary = {name: summary_of(list(by_seed.values())) for name, by_seed in methods.items()}
    found = comparisons(summary, methods, usage_exponent=study.aggregation.usage_exponent)
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "icmoe-simulation",
        "created": created,
        "commit": commit,
        "phantoms": hospitals.phantoms,
        "test_only": study.test_only,
        "configuration": {"study": study.model_dump(mode="json"), "simulation": simulation.model_dump(mode="json")},
        "study_digest": study.digest,
        "data_digest": hospitals.digest(),
        "masks_digest": hospitals.masks_digest(),
        "seeds": list(simulation.seeds),
        "threads_per_site": 1,
        "backbone": backbone,
        "versions": versions(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "labels": [label.name for label in study.labels],
        "experts": list(names_of(study.model)),
        "sites": {name: site_record(site) for name, site in hospitals.sites.items()},
        "hospitals": {name: site_record(site) for name, site in hospitals.sources.items()},
        "data_check": data_check,
        "expert_use": expert_use,
        "methods": methods,
        "summary": summary,
        "cross_site": cross_site(methods, list(hospitals.sites)),
        "privacy": (promise := privacy_record(study)),
        "comparisons": found + ([] if promise is None else [privacy_comparison(promise)]),
        "seconds": dict(seconds),
    }


def privacy_record(study: Study) -> Record | None:
    """Return what the study promises each training patient of a site; None without privacy at the site."""
    privacy = study.privacy.site
    if privacy is None:
        return None
    return {
        "epsilon": study_epsilon(study),
        "delta": privacy.delta,
        "unit": privacy.unit,
        "adjacency": "add or remove one patient",
        "accountant": privacy.accountant,
        "noise_multiplier": training_spending(privacy, rounds=study.rounds).noise_multiplier,
        "expected_batch": privacy.expected_batch,
    }


def privacy_comparison(promise: Record) -> Record:
    """Return the promise as a sentence among the answers; it has no bar."""
    sentence = (
        f"federated methods: epsilon {promise['epsilon']:.3g} at delta {promise['delta']:g} for each {promise['unit']} of a site "
        f"(adjacency: {promise['adjacency']}; accountant {promise['accountant']}; noise multiplier "
        f"{promise['noise_multiplier']:.3g}); local and pooled have no differential privacy, nor have the test scores shown here"
    )
    return {"sentence": sentence, "value": promise["epsilon"], "bar": None, "met": None}


def summary_of(runs: Sequence[Record]) -> Record:
    """Return mean and standard deviation of the test scores over the seeds; null where there is no test patient."""
    tests = [run["test"] for run in runs]
    sites = sorted({name for test in tests for name in test["sites"]})
    pooled, pooled_std = _mean_std([test["pooled"]["dice"] for test in tests])
    mean, mean_std = _mean_std([test["mean"]["dice"] for test in tests])
    per_site = {name: _mean_std([test["sites"][name]["dice"] for test in tests]) for name in sites}
    record: Record = {
        "dice_mean": mean,
        "dice_mean_std": mean_std,
        "dice_pooled": pooled,
        "dice_std": pooled_std,
        "dice_worst_site": _mean_std([test["worst_site"]["dice"] for test in tests])[0],
        "hd95_mm_mean": _mean_std([row["hd95_mm"] for test in tests for row in test["sites"].values()])[0],
        "per_site": {name: {"mean": value, "std": std} for name, (value, std) in per_site.items()},
    }
    own = [run["own_test"] for run in runs if run.get("own_test")]
    if own:
        own_sites = {name: _mean_std([test["sites"][name]["dice"] for test in own]) for name in sites}
        record["own_test"] = {name: {"mean": value, "std": std} for name, (value, std) in own_sites.items()}
    return record


def comparisons(
    summary: Mapping[str, Record], methods: Mapping[str, Mapping[str, Record]], *, usage_exponent: float
) -> list[Record]:
    """Return the questions that the rehearsal answers, with their numbers, whatever they show.

    Dice is the mean over all test patients; `usage_exponent` is that of the router-aware study.
    """
    dice = {name: row["dice_pooled"] for name, row in summary.items() if row["dice_pooled"] is not None}
    found: list[Record] = []
    ours = dice.get("router-aware")
    if ours is not None and dice.get("pooled"):
        found.append(
            _bar(f"router-aware reaches {ours / dice['pooled']:.3f} of training on pooled data", ours / dice["pooled"], 0.95)
        )
    if ours is not None and "local" in dice:
        gain = ours - dice["local"]
        found.append(
            _bar(f"router-aware is {gain:+.3f} Dice from the mean of the local models, each on all sites' tests", gain, 0.03)
        )
        found += _without_tiny_sites(ours, methods["local"])
        found += _own_sites(summary)
    found += _personalised(summary)
    if ours is not None and "fedavg" in dice:
        found.append(_usage_sentence(methods, usage_exponent))
    return found


def _bar(sentence: str, value: float, bar: float) -> Record:
    return {"sentence": sentence, "value": value, "bar": bar, "met": value >= bar}


def _without_tiny_sites(ours: float, local: Mapping[str, Record]) -> list[Record]:
    """Compare also with the local models of sites that have test patients: a one-patient site must not help us."""
    rows = [
        dice
        for run in local.values()
        for name, dice in run["everywhere"].items()
        if run["own_test"]["sites"][name]["dice"] is not None and dice is not None
    ]
    if not rows:
        return []
    gain = ours - fmean(rows)
    return [_bar(f"against the local models of sites that have test patients alone it is {gain:+.3f} Dice", gain, 0.03)]


def _own_sites(summary: Mapping[str, Record]) -> list[Record]:
    found = []
    for name, row in summary["local"].get("own_test", {}).items():
        federated = summary["router-aware"]["per_site"].get(name, {}).get("mean")
        if row["mean"] is not None and federated is not None:
            gain = federated - row["mean"]
            word = "gains" if gain >= 0 else "loses"
            both = f"{federated:.3f} federated, {row['mean']:.3f} with its own local model"
            sentence = f"{name} {word} {abs(gain):.3f} Dice on its own test: {both}"
            found.append({"sentence": sentence, "value": gain, "bar": None, "met": None})
    return found


def _personalised(summary: Mapping[str, Record]) -> list[Record]:
    """Compare each site's own model with what the site trains alone, both on its own test."""
    rows = [summary.get(name, {}).get("own_test", {}) for name in ("personalised", "local")]
    gains = {
        name: row["mean"] - rows[1][name]["mean"]
        for name, row in rows[0].items()
        if row["mean"] is not None and rows[1].get(name, {}).get("mean") is not None
    }
    if not gains:
        return []
    worst, mean = min(gains, key=lambda name: (gains[name], name)), fmean(gains.values())
    return [
        _bar(
            f"personalised: the site that gains least over its local model is {worst}, {gains[worst]:+.3f} Dice",
            gains[worst],
            -0.01,
        ),
        _bar(f"personalised is {mean:+.3f} Dice from local, each on its own test, mean of sites", mean, 0.02),
    ]


def _usage_sentence(methods: Mapping[str, Mapping[str, Record]], exponent: float) -> Record:
    """Say whether usage weights beat FedAvg, seed by seed."""
    aware, plain = methods["router-aware"], methods["fedavg"]
    gains = [aware[seed]["test"]["pooled"]["dice"] - plain[seed]["test"]["pooled"]["dice"] for seed in aware if seed in plain]
    mean, std = _mean_std(gains)
    spread = fmean(run["rounds"][-1]["usage_spread"] for run in aware.values())
    assert mean is not None
    seeds = f"{len(gains)} seeds, standard deviation {std:.4f}" if std is not None else "one seed, so no spread is known"
    sentence = (
        f"usage weights (t={exponent:g}) change Dice by {mean:+.4f} against FedAvg ({seeds}); "
        f"usage differs between sites by {spread:.3f}"
    )
    return {"sentence": sentence, "value": mean, "bar": None, "met": None}


def _mean_std(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    known = [value for value in values if value is not None]
    if not known:
        return None, None
    return fmean(known), stdev(known) if len(known) > 1 else None

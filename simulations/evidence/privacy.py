"""What patient-level differential privacy costs in quality: phantoms of 100, 500 and 2000 patients in the whole federation.

`nice -n 19 python simulations/evidence/privacy.py --out DIR` trains one IC-MoE (profile `lite`, 128 px, one slice and one
view per patient, four hospitals) without privacy and at epsilon 8, 3 and 1 (delta = 1 / (10 n), three seeds), and prints
Dice, epsilon, seconds and memory as they are. Every finished run is kept: the same command goes on after an
interruption and adds what is missing. Federated in one process, by the product's own local training and averaging.
"""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from fl_server.router_aware import combine
from fl_server.weights import plain_share
from icmoe.accounting import study_epsilon, training_spending
from icmoe.atomic import write_atomically
from icmoe.backbone import LITE_MEDSAM_DIGEST, load_backbone
from icmoe.cache_entries import default_cache_folder
from icmoe.config import parse
from icmoe.data.folder import read_folder
from icmoe.data.slices import SiteData
from icmoe.dataset import TrainingSet
from icmoe.errors import exit_on_fault
from icmoe.evaluation import score_slices
from icmoe.exchange import State, global_state, load_state, update_of
from icmoe.features import FeatureCache
from icmoe.model import build_model
from icmoe.prepare import encode_slices
from icmoe.privacy import private_round
from icmoe.profiles import merged, spelled_out
from icmoe.study import Study, derived_seed
from icmoe.training import train_round
from simulations.phantoms import DEFAULT_SITES, write_phantoms
from simulations.scenario import chosen

CPU = torch.device("cpu")
TEST_PATIENTS = 60
SMALLEST = 100
HOSPITALS = len(DEFAULT_SITES)
VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "frozen router": {"privacy": {"site": {"frozen_router": True}}},
    "sgd": {"training": {"learning_rate": 0.5}, "privacy": {"site": {"optimizer": "sgd"}}},
    "averaged": {"privacy": {"site": {"average_last": 0.5}}},
    "every patient each step": {"privacy": {"site": {"sample_rate": 1.0}}},
    "full model": {"profile": None},
}
"""Changes to the private study, to see which help."""


@dataclass(frozen=True, slots=True)
class Run:
    """One finished training.

    Parameters
    ----------
    patients
        Training patients of the whole federation.
    target
        Epsilon asked for, None without privacy.
    variant
        Key of `VARIANTS`.
    seed
        Of initial weights and, without privacy, of the batches.
    dice
        Mean over the test patients.
    epsilon
        Of the accountant, None without privacy.
    noise_multiplier
        0 without privacy.
    cpu_s
        Process CPU seconds of the training.
    peak_mb
        Largest resident set of the process so far.
    """

    patients: int
    target: float | None
    variant: str
    seed: int
    dice: float
    epsilon: float | None
    noise_multiplier: float
    cpu_s: float
    peak_mb: float


def study_of(patients: int, target: float | None, variant: str, seed: int) -> Study:
    """Return the study of one run.

    A step takes half of 100 patients and a share of more that falls with the root of their number: it costs twice as
    much for four times the patients. Without privacy the epochs fall alike.
    """
    fewer = math.sqrt(SMALLEST / max(patients, SMALLEST))
    values: dict[str, Any] = {
        "name": "privacy",
        "seed": seed,
        "rounds": 5,
        "profile": "lite",
        "labels": [{"name": "background", "values": [0]}, {"name": "lesion", "values": [1, 255]}],
        "backbone": {"digest": LITE_MEDSAM_DIGEST},
        "training": {"views": ["identity"], "local_epochs": math.ceil(4 * fewer)},
    }
    if target is not None:
        site = {
            "epsilon": target,
            "delta": 1 / (10 * patients),
            "patients": patients // HOSPITALS,
            "sample_rate": round(0.5 * fewer, 3),
            "steps": 20,
        }
        values = merged(merged(values, {"privacy": {"site": site}}), VARIANTS[variant])
    if values["profile"] is None:
        del values["profile"]
    return parse(Study, spelled_out(values, where="evidence"), where="evidence")


def phantoms_of(patients: int, out: Path) -> dict[str, SiteData]:
    """Return four hospitals with so many training patients in all, one slice each, their features cached."""
    study = study_of(patients, None, "base", 1)
    root = out / f"phantoms-{patients}"
    if not root.exists():
        root.parent.mkdir(parents=True, exist_ok=True)
        each, tested = patients // HOSPITALS, TEST_PATIENTS // HOSPITALS
        hospitals = [
            replace(site, slices_per_patient=1, train_patients=each, val_patients=1, test_patients=tested)
            for site in DEFAULT_SITES
        ]
        write_phantoms(root, seed=11, size_px=128, sites=hospitals)
    sites = read_folder(root, study.labels)
    backbone = load_backbone("lite-medsam", image_size=study.backbone.image_size, device=CPU)
    cache = FeatureCache.of(default_cache_folder(), study)
    encode_slices([item for site in sites.values() for item in site.slices], study, backbone, cache)
    return sites


def trained(study: Study, sites: dict[str, SiteData], cache: FeatureCache) -> State:
    """Return the global model after all rounds of plain FedAvg; all hospitals have one size."""
    data = {name: TrainingSet(site.of("train"), study, cache) for name, site in sorted(sites.items())}
    state = global_state(build_model(study, seed=derived_seed(study, "model")))
    share_S = plain_share(np.ones(len(data)))
    for round_number in range(1, study.rounds + 1):
        updates = [_update(study, state, data[name], name, round_number) for name in data]
        for key in updates[0]:
            moved = combine(state[key].numpy(), [update[key].numpy() for update in updates], share_S, 1.0)
            state[key] = torch.from_numpy(moved)
    return state


def _update(study: Study, state: State, data: TrainingSet, name: str, round_number: int) -> State:
    model = build_model(study, seed=0)
    load_state(model, state)
    if study.privacy.site is not None:
        private_round(model, data, study, round_number=round_number, device=CPU)
    else:
        seed = derived_seed(study, "train", name, round_number)
        train_round(model, data, study, round_number=round_number, seed=seed, device=CPU)
    return update_of(model, state, personal=False, shape=study.model)


def one_run(patients: int, target: float | None, variant: str, seed: int, sites: dict[str, SiteData]) -> Run:
    """Train and score once."""
    study = study_of(patients, target, variant, seed)
    cache = FeatureCache.of(default_cache_folder(), study)
    privacy = study.privacy.site
    sigma = 0.0 if privacy is None else training_spending(privacy, rounds=study.rounds).noise_multiplier
    began = time.process_time()
    state = trained(study, sites, cache)
    cpu_s = time.process_time() - began
    model = build_model(study, seed=0)
    load_state(model, state)
    test = [item for site in sites.values() for item in site.of("test")]
    scores = score_slices(model.eval(), test, study.labels, cache, CPU, surfaces=False)
    return Run(
        patients=patients,
        target=target,
        variant=variant,
        seed=seed,
        dice=fmean(score.dice for score in scores),
        epsilon=None if privacy is None else study_epsilon(study),
        noise_multiplier=sigma,
        cpu_s=cpu_s,
        peak_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    )


def wanted(patients: list[int], seeds: int, variants: list[str]) -> Iterator[tuple[int, float | None, str, int]]:
    """Yield every run, small federations first; variants are tried at epsilon 8 alone."""
    for count in patients:
        for target, seed in product((None, 8.0, 3.0, 1.0), range(1, seeds + 1)):
            yield count, target, "base", seed
        for variant, seed in product(variants, range(1, seeds + 1)):
            yield count, 8.0, variant, seed


def table_of(runs: list[Run]) -> Table:
    """Return mean and spread over the seeds."""
    table = Table("patients", "variant", "epsilon", "delta", "noise", "test Dice", "seeds", "CPU s", "peak MB")
    groups: dict[tuple[int, float | None, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.patients, run.target, run.variant), []).append(run)
    for (patients, target, variant), group in groups.items():
        dice = [run.dice for run in group]
        spread = f" +-{stdev(dice):.3f}" if len(dice) > 1 else ""
        shown = ("none", "-") if target is None else (f"{group[0].epsilon:.2f}", f"{1 / (10 * patients):g}")
        table.add_row(
            *(str(patients), variant, *shown, f"{group[0].noise_multiplier:.2f}", f"{fmean(dice):.3f}{spread}"),
            *(str(len(dice)), f"{fmean(run.cpu_s for run in group):.0f}", f"{max(run.peak_mb for run in group):.0f}"),
        )
    table.caption = "unit: the patient; adjacency: add or remove one patient of a site; accountant: prv"
    return table


def main(
    out: Annotated[Path, typer.Option(help="Folder of phantoms and finished runs.")] = Path("runs/privacy"),
    patients: Annotated[list[int] | None, typer.Option(help="Training patients of the federation; repeatable.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds 1..N.")] = 3,
    variants: Annotated[list[str] | None, typer.Option(help="Variants to try at epsilon 8; repeatable.")] = None,
) -> None:
    """Train what is missing and print the table."""
    torch.set_num_threads(1)
    kept = out / "privacy.json"
    with exit_on_fault():
        runs = [Run(**row) for row in json.loads(kept.read_text())] if kept.exists() else []
        done = {(run.patients, run.target, run.variant, run.seed) for run in runs}
        sites: dict[int, dict[str, SiteData]] = {}
        tried = chosen(",".join(variants), VARIANTS, "--variants") if variants else []
        for key in wanted(patients or [100, 500, 2000], seeds, tried):
            if key not in done:
                sites[key[0]] = sites.get(key[0]) or phantoms_of(key[0], out)
                runs.append(one_run(*key, sites[key[0]]))
                write_atomically(kept, json.dumps([asdict(run) for run in runs], indent=1).encode())
                sys.stderr.write(f"{runs[-1]}\n")
    Console(width=130).print(table_of(runs))


if __name__ == "__main__":
    typer.run(main)

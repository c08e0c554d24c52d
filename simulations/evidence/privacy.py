"""What patient-level differential privacy costs in quality: phantoms of 100, 500 and 2000 patients in the whole federation.

`nice -n 19 python -m simulations.evidence.privacy --out DIR` trains one IC-MoE (profile `lite`, 128 px, one slice and one
view per patient, four hospitals) without privacy and at epsilon 8, 3 and 1 (delta = 1 / (10 n), three seeds), and prints
Dice, epsilon, seconds and memory as they are. `--data FOLDER` does so with real hospitals, up to four slices of a patient
in a step; hospitals with fewer than `FEWEST` patients stay out. Every finished run is kept: the same command goes on after
an interruption and adds what is missing. Federated in one process, by the product's own local training and averaging.
"""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any

import numpy as np
import torch
import typer
from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from rich.table import Table
from typer import Option

from fl_server.router_aware import combine
from fl_server.weights import plain_share
from icmoe.accounting import study_epsilon, training_spending
from icmoe.atomic import read_regular, write_atomically
from icmoe.backbone import load_backbone
from icmoe.backbones import DEFAULT, DEFAULT_WEIGHTS
from icmoe.cache_entries import default_cache_folder
from icmoe.config import parse
from icmoe.data.folder import read_folder
from icmoe.data.slices import SiteData
from icmoe.dataset import TrainingSet
from icmoe.errors import NOT_STARTED, Fault, IcmoeError, exit_on_fault
from icmoe.evaluation import score_slices
from icmoe.exchange import State, global_state, update_of
from icmoe.features import FeatureCache
from icmoe.model import build_model, model_of
from icmoe.prepare import encode_slices
from icmoe.privacy import private_round
from icmoe.profiles import merged, spelled_out
from icmoe.study import Label, Study, derived_seed
from icmoe.training import train_round
from icmoe.usage import OneCommand
from simulations.hospitals import digests_of
from simulations.phantoms import DEFAULT_SITES, write_phantoms
from simulations.scenario import DEFAULT_LABELS, chosen

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
CPU = torch.device("cpu")
TEST_PATIENTS = 60
FULL_SHARE = 100  # patients up to which a step takes half of them
ROUNDS = 5
PHANTOM_SEED = 11
HOSPITALS = len(DEFAULT_SITES)  # of two training patients at least: a private step takes half of them
VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "frozen router": {"privacy": {"site": {"frozen_router": True}}},
    "sgd": {"training": {"learning_rate": 0.5}, "privacy": {"site": {"optimizer": "sgd"}}},
    "averaged": {"privacy": {"site": {"average_last": 0.5}}},
    "few steps of everybody": {"privacy": {"site": {"sample_rate": 1.0, "steps": 4}}},
    "full model": {"profile": None},
    "warm-up": {},
    "warm-up and small steps": {"training": {"learning_rate": 1e-4}},
    "warm-up and few steps of everybody": {
        "training": {"learning_rate": 3e-4},
        "privacy": {"site": {"sample_rate": 1.0, "steps": 4, "average_last": 0.5}},
    },
}
"""Changes to the private study, to see which help; a warm-up trains on other phantoms first, without privacy."""
WARM_ALONE = "warm-up alone"
WARM_PATIENTS, WARM_SEED = 500, 12
FEWEST = 4
PHANTOMS = "phantoms"


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
    source
        Where the patients are from: "phantoms" or a folder's name.
    recipe_digest
        Of the study but its seed; empty in runs of a former version.
    data_digest
        Of pictures and masks; empty in runs of a former version.
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
    source: str = PHANTOMS
    recipe_digest: str = ""
    data_digest: str = ""


_RUNS = TypeAdapter(list[Run])


@dataclass(frozen=True, slots=True)
class Cohort:
    """Hospitals to train with.

    Parameters
    ----------
    patients
        Training patients of the whole federation.
    smallest
        Training patients of the smallest hospital.
    slices
        Slices of a patient per step.
    sites
        The hospitals.
    """

    patients: int
    smallest: int
    slices: int
    sites: dict[str, SiteData]

    def digest(self) -> str:
        """Return what the data are known by."""
        return ":".join(digests_of(self.sites))


def study_of(cohort: Cohort, target: float | None, variant: str, seed: int) -> Study:
    """Return the study of one run.

    A step takes half of 100 patients and a share of more that falls with the root of their number: it costs twice as
    much for four times the patients. Without privacy the epochs fall alike.
    """
    fewer = math.sqrt(FULL_SHARE / max(cohort.patients, FULL_SHARE))
    values: dict[str, Any] = {
        "name": "privacy",
        "seed": seed,
        "rounds": ROUNDS,
        "profile": "lite",
        "labels": DEFAULT_LABELS,
        "backbone": {"digest": DEFAULT_WEIGHTS.digest},
        "training": {"views": ["identity"], "local_epochs": math.ceil(4 * fewer)},
    }
    if target is not None:
        site = {
            "epsilon": target,
            "delta": 1 / (10 * cohort.patients),
            "patients": cohort.smallest,
            "sample_rate": round(0.5 * fewer, 3),
            "steps": 20,
            "slices_per_patient": cohort.slices,
        }
        values = merged(merged(values, {"privacy": {"site": site}}), VARIANTS[variant])
    if values["profile"] is None:
        del values["profile"]
    return parse(Study, spelled_out(values, where="evidence"), where="evidence")


def phantoms_of(patients: int, out: Path, *, seed: int = PHANTOM_SEED) -> Cohort:
    """Return four hospitals with so many training patients in all, one slice each."""
    root = out / (f"phantoms-{patients}" if seed == PHANTOM_SEED else f"phantoms-{patients}-{seed}")
    if not root.exists():
        root.parent.mkdir(parents=True, exist_ok=True)
        each, tested = patients // HOSPITALS, TEST_PATIENTS // HOSPITALS
        hospitals = [
            replace(site, slices_per_patient=1, train_patients=each, val_patients=1, test_patients=tested)
            for site in DEFAULT_SITES
        ]
        write_phantoms(root, seed=seed, size_px=128, sites=hospitals)
    return _cohort(read_folder(root, _labels()), slices=1)


def real_hospitals(folder: Path) -> Cohort:
    """Return the hospitals of a folder that have at least `FEWEST` training patients."""
    sites = read_folder(folder, _labels())
    counts = {name: _training_patients(site) for name, site in sites.items()}
    if max(counts.values()) < FEWEST:
        what, value = "no hospital has enough patients in training", ", ".join(f"{name} {n}" for name, n in counts.items())
        raise IcmoeError(Fault(number=108, where=folder.name, what=what, value=value, limit=str(FEWEST), did=NOT_STARTED))
    return _cohort({name: site for name, site in sites.items() if counts[name] >= FEWEST}, slices=4)


def _cohort(sites: dict[str, SiteData], *, slices: int) -> Cohort:
    counts = [_training_patients(site) for site in sites.values()]
    return Cohort(sum(counts), min(counts), slices, sites)


def _training_patients(site: SiteData) -> int:
    return len({item.patient for item in site.of("train")})


def _labels() -> tuple[Label, ...]:
    return tuple(parse(Label, label, where="evidence") for label in DEFAULT_LABELS)


def encoded(cohort: Cohort, study: Study) -> FeatureCache:
    """Return the cache that holds the features of all slices; what is missing is computed."""
    cache = FeatureCache.of(default_cache_folder(), study)
    backbone = load_backbone(DEFAULT, image_size=study.backbone.image_size, device=CPU)
    encode_slices([item for site in cohort.sites.values() for item in site.slices], study, backbone, cache)
    return cache


def trained(study: Study, cohort: Cohort, cache: FeatureCache, start: State | None) -> State:
    """Return the global model after all rounds of plain FedAvg; every hospital counts alike."""
    data = {name: TrainingSet(site.of("train"), study, cache) for name, site in sorted(cohort.sites.items())}
    state = dict(start or global_state(build_model(study, seed=derived_seed(study, "model"))))
    share_S = plain_share(np.ones(len(data)))
    for round_number in range(1, study.rounds + 1):
        updates = [_update(study, state, data[name], name, round_number) for name in data]
        for key in updates[0]:
            moved = combine(state[key].numpy(), [update[key].numpy() for update in updates], share_S, 1.0)
            state[key] = torch.from_numpy(moved)
    return state


def _update(study: Study, state: State, data: TrainingSet, name: str, round_number: int) -> State:
    model = model_of(study, state)
    if study.privacy.site is not None:
        private_round(model, data, study, round_number=round_number, device=CPU)
    else:
        seed = derived_seed(study, "train", name, round_number)
        train_round(model, data, study, round_number=round_number, seed=seed, device=CPU)
    return update_of(model, state, personal=False, shape=study.model)


@lru_cache
def warmed_up(seed: int, out: Path) -> State:
    """Return a model trained without privacy on phantoms that no private run sees."""
    cohort = phantoms_of(WARM_PATIENTS, out, seed=WARM_SEED)
    study = study_of(cohort, None, "base", seed)
    return trained(study, cohort, encoded(cohort, study), None)


def one_run(source: str, cohort: Cohort, target: float | None, variant: str, seed: int, out: Path) -> Run:
    """Train and score once."""
    study = study_of(cohort, target, variant, seed)
    privacy, cache = study.privacy.site, encoded(cohort, study)
    start = warmed_up(seed, out) if variant.startswith("warm-up") else None
    began = time.process_time()
    state = start if variant == WARM_ALONE and start is not None else trained(study, cohort, cache, start)
    cpu_s = time.process_time() - began
    return Run(
        source=source,
        patients=cohort.patients,
        target=target,
        variant=variant,
        seed=seed,
        dice=test_dice(study, cohort, cache, state),
        epsilon=None if privacy is None else study_epsilon(study),
        noise_multiplier=0.0 if privacy is None else training_spending(privacy, rounds=study.rounds).noise_multiplier,
        cpu_s=cpu_s,
        peak_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        recipe_digest=recipe_digest(study),
        data_digest=cohort.digest(),
    )


def recipe_digest(study: Study) -> str:
    """Return the digest of a study but its seed, which runs of one row have in common."""
    return study.model_copy(update={"seed": 0}).digest


def test_dice(study: Study, cohort: Cohort, cache: FeatureCache, state: State) -> float:
    """Return the mean Dice over the test patients of all hospitals."""
    model = model_of(study, state)
    test = [item for site in cohort.sites.values() for item in site.of("test")]
    return fmean(score.dice for score in score_slices(model.eval(), test, study.labels, cache, CPU, surfaces=False))


def wanted(seeds: int, variants: list[str]) -> Iterator[tuple[float | None, str, int]]:
    """Yield every run of a cohort once; variants are tried at epsilon 8 alone."""
    kinds = [(target, "base") for target in (None, 8.0, 3.0, 1.0)]
    kinds += [(None if variant == WARM_ALONE else 8.0, variant) for variant in variants]
    for (target, variant), seed in product(dict.fromkeys(kinds), range(1, seeds + 1)):
        yield target, variant, seed


def missing(runs: list[Run], cohort: Cohort, seeds: int, variants: list[str]) -> list[tuple[float | None, str, int]]:
    """Return the runs of a cohort that were not kept; one of other data or of another recipe is none of them."""
    data = cohort.digest()
    done = {(run.target, run.variant, run.seed, run.recipe_digest) for run in runs if run.data_digest == data}
    return [key for key in wanted(seeds, variants) if (*key, recipe_digest(study_of(cohort, *key))) not in done]


def table_of(runs: list[Run]) -> Table:
    """Return mean and spread over the seeds."""
    columns = (
        "source",
        "patients",
        "variant",
        "epsilon",
        "delta",
        "noise",
        "test Dice",
        "seeds",
        "CPU s",
        "peak MB",
        "data, study",
    )
    table = Table(*columns)
    groups: dict[tuple[str, int, float | None, str, str], list[Run]] = {}
    for run in runs:
        origin = f"{run.data_digest[:6]} {run.recipe_digest[:6]}".strip() or "not known"
        groups.setdefault((run.source, run.patients, run.target, run.variant, origin), []).append(run)
    for (source, patients, target, variant, origin), group in groups.items():
        dice = [run.dice for run in group]
        spread = f" +-{stdev(dice):.3f}" if len(dice) > 1 else ""
        shown = ("none", "-") if target is None else (f"{group[0].epsilon:.2f}", f"{1 / (10 * patients):g}")
        table.add_row(
            *(source, str(patients), variant, *shown, f"{group[0].noise_multiplier:.2f}", f"{fmean(dice):.3f}{spread}"),
            *(str(len(dice)), f"{fmean(run.cpu_s for run in group):.0f}", f"{max(run.peak_mb for run in group):.0f}"),
            origin,
        )
    table.caption = "unit: the patient; adjacency: add or remove one patient of a site; accountant: prv"
    return table


def finished(path: Path) -> list[Run]:
    """Return the runs that were kept; none where there is no file yet.

    Raises
    ------
    IcmoeError
        525 where it is damaged.
    """
    if not path.exists():
        return []
    try:
        return _RUNS.validate_json(read_regular(path))
    except ValidationError:
        raise IcmoeError(Fault(number=525, where=path.name, what="it is damaged", did="It was kept.")) from None


@app.command(cls=OneCommand)
def main(
    out: Annotated[Path, Option(help="Folder of phantoms and finished runs.")] = Path("runs/privacy"),
    patients: Annotated[
        list[int] | None, Option(min=2 * HOSPITALS, help="Training patients of the federation; repeatable.")
    ] = None,
    data: Annotated[Path | None, Option(help="Folder of real hospitals, in place of phantoms.", exists=True)] = None,
    seeds: Annotated[int, Option(min=1, help="Seeds 1..N.")] = 3,
    variants: Annotated[list[str] | None, Option(help="Variants to try at epsilon 8; repeatable.")] = None,
) -> None:
    """Train what is missing and print the table."""
    torch.set_num_threads(1)
    kept = out / "privacy.json"
    with exit_on_fault():
        runs = finished(kept)
        tried = [name for word in variants or [] for name in chosen(word, [*VARIANTS, WARM_ALONE], "--variants")]
        for source, count in [(data.name, 0)] if data else [(PHANTOMS, count) for count in patients or [100, 500, 2000]]:
            cohort = real_hospitals(data) if data else phantoms_of(count, out)
            for key in missing(runs, cohort, seeds, tried):
                runs.append(one_run(source, cohort, *key, out))
                write_atomically(kept, json.dumps([asdict(run) for run in runs], indent=1).encode())
                sys.stderr.write(f"{runs[-1]}\n")
    Console(width=140).print(table_of(runs))


if __name__ == "__main__":
    app()

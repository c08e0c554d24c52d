"""A variant trained across the sites, and how well it does on patients that it did not see; the test patients stay unseen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import fmean, stdev

import torch
from rich.table import Table

from fl_server.run_state import RunState
from icmoe.cache_entries import default_cache_folder
from icmoe.data.slices import SiteData, Slice
from icmoe.errors import Fault, IcmoeError
from icmoe.evaluation import score_slices
from icmoe.exchange import global_state
from icmoe.features import FeatureCache
from icmoe.model import build_model, model_of
from icmoe.study import Study, View
from simulations.evidence.bars import Patients, mean_of_sites, paired
from simulations.federation import Job
from simulations.hospitals import Hospitals
from simulations.scoring import patient_label, tensors

LEAST_PATIENTS = 2
"""Of a site that is left out: with one there is no spread, and a mean of sites would hang on it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What is trained.

    Parameters
    ----------
    name
        Of the variant.
    study
        Its study, with the seed.
    left
        Site that takes no part; empty where all do.
    """

    name: str
    study: Study
    left: str = ""

    def job(self, hospitals: Hospitals, folder: Path) -> Job:
        """Return the training, whose state goes below `folder`."""
        without = f"-without-{self.left}" if self.left else ""
        return Job(
            method=self.name + without,
            study=self.study,
            names=tuple(name for name in hospitals.training if name != self.left),
            state_path=folder / f"{self.study.name}-seed{self.study.seed}{without}.safetensors",
        )

    def patients(self, hospitals: Hospitals) -> list[Slice]:
        """Return the slices to score: of `val`, or all but the test of the site that took no part."""
        if not self.left:
            return [item for name in hospitals.training for item in hospitals.sites[name].of("val")]
        return [item for split in ("train", "val") for item in hospitals.sites[self.left].of(split)]


def left_out(hospitals: Hospitals) -> tuple[str, ...]:
    """Return the sites that can be left out in turn.

    Raises
    ------
    IcmoeError
        210 where fewer than two sites train, or none has two patients outside its test that no other site has.
    """
    whose = {name: _patients(hospitals.sites[name]) for name in hospitals.training}
    shared = {name: set().union(*(others for other, others in whose.items() if other != name)) for name in whose}
    found = tuple(name for name, own in whose.items() if len(own) >= LEAST_PATIENTS and not own & shared[name])
    if len(whose) < 2 or not found:
        limit = f"two sites that train, one of them with {LEAST_PATIENTS} patients of its own outside its test"
        value = ", ".join(f"{name}: {len(own - shared[name])}" for name, own in whose.items())
        raise IcmoeError(Fault(number=210, where="--unseen", value=value, limit=limit, did="Nothing was trained."))
    return found


def _patients(site: SiteData) -> set[tuple[str, str]]:
    return {(item.site, item.patient) for split in ("train", "val") for item in site.of(split)}


def views_of(trials: Sequence[Trial]) -> tuple[View, ...]:
    """Return the views of training images that are trained on, and the images as they are where they will be scored."""
    scored: list[View] = ["identity"] if any(trial.left for trial in trials) else []
    return tuple(dict.fromkeys(chain(scored, *(trial.study.training.views for trial in trials))))


def score_trial(trial: Trial, run: RunState, hospitals: Hospitals, device: torch.device) -> Patients:
    """Return the Dice of each patient that `trial` is scored on."""
    study = trial.study
    model, cache = model_of(study, tensors(run.arrays)).to(device).eval(), FeatureCache.of(default_cache_folder(), study)
    scores = score_slices(model, trial.patients(hospitals), study.labels, cache, device, surfaces=False)
    found: Patients = {}
    for score in scores:
        site = trial.left or score.site
        found[site, patient_label(site, score.site, score.patient)] = score.dice
    return found


def compared(found: Mapping[str, Sequence[Patients]], studies: Mapping[str, Study], title: str, base: str = "full") -> Table:
    """Return the table of the variants.

    Parameters
    ----------
    found
        By variant, the scores of each seed.
    studies
        By variant, for the number of trained parameters.
    title
        Above the table.
    base
        Variant that the others are compared with, patient by patient, where it is among them: the mean over the seeds, with the
        95 % interval of other patients of the same sites.
    """
    table = Table(title=title, title_justify="left")
    for column in ("variant", "Dice", "spread", f"against {base}, 95 % over patients", "parameters"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for name, seeds in found.items():
        values = [mean_of_sites(scores) for scores in seeds]
        against = "-" if base not in found or name == base else str(paired(seeds, found[base])[1])
        size = sum(tensor.numel() for tensor in global_state(build_model(studies[name], seed=0)).values())
        spread = f"{stdev(values):.3f}" if len(values) > 1 else "-"
        table.add_row(name, f"{fmean(values):.3f}", spread, against, f"{size:,}")
    return table

"""Final test scores of every method: models from their committed states, patients as volumes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

from fl_client.participant import Participant
from fl_client.personal import with_personal
from fl_server.round_strategy import Tensors
from fl_server.run_state import RunState
from icmoe.errors import Fault, IcmoeError
from icmoe.evaluation import score_slices
from icmoe.exchange import State
from icmoe.features import FeatureCache
from icmoe.metrics import PatientScore, evaluation_record
from icmoe.model import ICMoE, model_of
from icmoe.study import Study
from simulations.alone import POOLED, of_site
from simulations.cross_site import dice_by_site
from simulations.hospitals import Hospitals

Record = dict[str, Any]
Tick = Callable[[], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Examiner:
    """Scores models on the test patients of all sites.

    Parameters
    ----------
    hospitals
        Data.
    cache
        Features.
    site
        Any training site; gives the device.
    on_patient
        Called after each patient.
    """

    hospitals: Hospitals
    cache: FeatureCache
    site: Participant
    on_patient: Tick | None = None

    def model(self, study: Study, state: State) -> ICMoE:
        """Return the model with these tensors, ready to score."""
        return model_of(study, state).to(self.site.torch_device()).eval()

    def scores(self, study: Study, state: State, sites: Sequence[str] | None = None) -> list[PatientScore]:
        """Return the score of each test patient of the sites named, of all sites where none is."""
        return self.scored(self.model(study, state), study, sites)

    def scored(self, model: nn.Module, study: Study, sites: Sequence[str] | None = None) -> list[PatientScore]:
        """Return what `scores` does, of a model that is at hand."""
        names = sites if sites is not None else list(self.hospitals.sites)
        tests = {name: self.hospitals.sites[name].of("test") for name in names}
        # Virtual sites may share patients; each is predicted once and counts at every site that has it.
        slices = list(dict.fromkeys(item for rows in tests.values() for item in rows))
        device = self.site.torch_device()
        scores = score_slices(model.to(device).eval(), slices, study.labels, self.cache, device, on_patient=self.on_patient)
        found = {(score.site, score.patient): score for score in scores}
        return [
            replace(found[hospital, patient], site=name, patient=patient_label(name, hospital, patient))
            for name, rows in tests.items()
            for hospital, patient in sorted({(item.site, item.patient) for item in rows})
        ]

    def record(self, study: Study, patients: Sequence[PatientScore]) -> Record:
        """Return the scores as `icmoe evaluate --json` prints them."""
        return evaluation_record(patients, self.hospitals.sites, [label.name for label in study.labels])


def patient_label(site: str, hospital: str, patient: str) -> str:
    """Return the patient's name at a site; virtual sites may hold patients of several hospitals."""
    return patient if site == hospital else f"{hospital}/{patient}"


def tensors(arrays: Tensors) -> State:
    """Return NumPy arrays as tensors."""
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def federated_test(examiner: Examiner, study: Study, run: RunState, state_folder: Path) -> Record:
    """Return the test record of the global model; in personal mode also of each site's own model, `own_test` and `by_site`."""
    state = tensors(run.arrays)
    record = examiner.record(study, examiner.scores(study, state))
    if not study.aggregation.personal:
        return {"test": record, "own_test": None}
    own: list[PatientScore] = []
    by_site: dict[str, dict[str, float | None]] = {}
    for name in examiner.hospitals.training:
        patients = examiner.scores(study, with_personal(state, state_folder, study, name, study.rounds))
        by_site[name] = dice_by_site(examiner.record(study, patients))
        own += [patient for patient in patients if patient.site == name]
    return {"test": record, "own_test": examiner.record(study, own), "by_site": by_site}


def local_test(examiner: Examiner, study: Study, run: RunState) -> Record:
    """Return the scores of the local models.

    Their mean (`test`), each on its own site's test (`own_test`), each over all patients (`everywhere`) and each at every
    site (`by_site`).
    """
    each: dict[str, Record] = {}
    own: list[PatientScore] = []
    for name in examiner.hospitals.training:
        patients = examiner.scores(study, tensors(of_site(run.arrays, name)))
        each[name] = examiner.record(study, patients)
        own += [patient for patient in patients if patient.site == name]
    everywhere = {name: record["pooled"]["dice"] for name, record in each.items()}
    return {
        "test": mean_record(list(each.values())),
        "own_test": examiner.record(study, own),
        "everywhere": everywhere,
        "by_site": {name: dice_by_site(record) for name, record in each.items()},
    }


def pooled_test(examiner: Examiner, study: Study, run: RunState) -> Record:
    """Return the test record of the model trained on all data together."""
    return examiner.record(study, examiner.scores(study, tensors(of_site(run.arrays, POOLED))))


def mean_record(records: Sequence[Record]) -> Record:
    """Return the mean of equally shaped records, number by number; null stays null.

    The worst site is looked for again, since each record may have another one.
    """
    result = _mean_tree(list(records))
    assert isinstance(result, dict)
    scored = {name: row for name, row in result["sites"].items() if row["dice"] is not None}
    if scored:
        worst = min(scored, key=lambda name: (scored[name]["dice"], name))
        result["worst_site"] = {key: scored[worst].get(key, worst) for key in result["worst_site"]}
        result["worst_site"]["site"] = worst
    return result


def _mean_tree(nodes: list[Any]) -> Any:  # noqa: ANN401  (a JSON tree)
    first = nodes[0]
    if isinstance(first, dict):
        return {key: _mean_tree([node[key] for node in nodes]) for key in first}
    if isinstance(first, float):
        return fmean(nodes)
    return first


def best_median_worst(patients: Sequence[PatientScore]) -> list[tuple[str, PatientScore]]:
    """Return the best, median and worst patient by Dice; fewer where there are fewer patients."""
    ranked = sorted(patients, key=lambda patient: (patient.dice, patient.site, patient.patient))
    if not ranked:
        return []
    chosen = {"best": ranked[-1], "median": ranked[len(ranked) // 2], "worst": ranked[0]}
    return list(chosen.items())


def require_unchanged(before: str, after: str) -> None:
    """Stop unless the frozen backbone is the same, bit for bit, after training.

    Raises
    ------
    IcmoeError
        401 where the digests differ.
    """
    if before != after:
        raise IcmoeError(Fault(number=401, value=after, limit=before, did="No result was written."))

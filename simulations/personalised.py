"""The sites' own models of a rehearsal, from the router-aware model and each site's local one of the same seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fl_server.run_state import RunState
from icmoe.exchange import State
from icmoe.mixture import joined, mixture_of
from icmoe.modelfile import ModelHeader, read_model, write_model
from icmoe.personalise import GLOBAL, OWN, TUNED, OwnData, Personal, personalise, tune
from icmoe.study import Study
from simulations.alone import of_site
from simulations.cross_site import dice_by_site
from simulations.folder import RunFolder
from simulations.methods import AFTERWARDS
from simulations.scoring import Examiner, tensors

Record = dict[str, Any]
NAME = "personalised"
NEEDS = AFTERWARDS[NAME]
"""Methods that it starts from."""


def personalised_record(examiner: Examiner, study: Study, run: RunState, alone: RunState, work: Path, out: RunFolder) -> Record:
    """Return scores, choices and model paths of one seed; there is no round, since all of it happens at the sites.

    Parameters
    ----------
    examiner
        Data, features, device.
    study, run
        The router-aware study and its final state.
    alone
        Final state of the sites' local models.
    work
        Where tuned models are kept, so that a stopped rehearsal does not tune twice.
    out
        Where the models are published.
    """
    scores, chosen, models, by_site = [], {}, {}, {}
    for site in examiner.hospitals.training:
        found = site_model(examiner, study, tensors(run.arrays), tensors(of_site(alone.arrays, site)), site, work)
        model = mixture_of(study, found.states, found.weights)
        patients = examiner.scored(model, study)
        scores += [patient for patient in patients if patient.site == site]
        by_site[site] = dice_by_site(examiner.record(study, patients))
        chosen[site] = {"choice": found.choice, "weights": found.weights, "val_dice": found.val_dice, "untaught": found.untaught}
        path = out.model(NAME, study.seed, site)
        write_model(path, joined(found.states), _header(examiner, study, NAME).model_copy(update={"weights": found.weights}))
        models[site] = str(path.relative_to(out.root))
    test = examiner.record(study, scores)
    scored = {"test": test, "own_test": test, "by_site": by_site}
    return {"rounds": [], **scored, "chosen": chosen, "model": None, "models": models}


def site_model(examiner: Examiner, study: Study, state: State, own: State, site: str, work: Path) -> Personal:
    """Return the own model of one site from the global tensors and those of its local model; see `personalised_record`."""
    rows = examiner.hospitals.sites[site]
    device = examiner.site.torch_device()
    data = OwnData(site=site, train=rows.of("train"), val=rows.of("val"), cache=examiner.cache, device=device)
    kept = work / f"tuned-{site}-seed{study.seed}.safetensors"
    if not kept.exists():
        threads = torch.get_num_threads()
        torch.set_num_threads(examiner.site.threads)  # as in every training: equal seeds, equal bytes
        write_model(kept, tune(state, study, data), _header(examiner, study, TUNED))
        torch.set_num_threads(threads)
    tuned = read_model(kept)[0].state_dict()
    return personalise(study, {GLOBAL: state, TUNED: tuned, OWN: own}, data)


def _header(examiner: Examiner, study: Study, method: str) -> ModelHeader:
    return ModelHeader(study=study, method=method, round=study.rounds, phantoms=examiner.hospitals.phantoms)

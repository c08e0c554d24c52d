"""What a site computes in one round and the numbers about it that may leave."""

from __future__ import annotations

import math

from fl_client.manifest import Numbers
from fl_client.participant import Participant
from icmoe.dataset import TrainingSet
from icmoe.evaluation import score_slices
from icmoe.exchange import (
    DICE_KEY,
    LOSS_KEY,
    PATIENTS_KEY,
    SECONDS_KEY,
    SLICES_KEY,
    STEPS_KEY,
    USAGE_KEY,
    announced_size,
)
from icmoe.model import ICMoE
from icmoe.study import Study, derived_seed
from icmoe.training import train_round


def size_of(site: Participant, study: Study) -> int:
    """Return n_k as it leaves: slices rounded up to ten, exact in a simulation, a public constant under privacy."""
    privacy = study.privacy.site
    return announced_size(len(site.train), exact=site.exact_counts) if privacy is None else privacy.patients


def train_here(site: Participant, study: Study, model: ICMoE, round_number: int) -> Numbers:
    """Train the model in place for one round and return the numbers that leave with its update."""
    data = TrainingSet(site.train, study, site.cache(study))
    device = site.torch_device()
    seed = derived_seed(study, "train", site.name, round_number)
    result = train_round(model, data, study, round_number=round_number, seed=seed, device=device, steps=site.steps_per_round)
    return {
        SLICES_KEY: size_of(site, study),
        USAGE_KEY: list(result.usage_M),
        LOSS_KEY: result.loss,
        STEPS_KEY: result.steps,
        SECONDS_KEY: result.train_s,
    }


def validation_numbers(site: Participant, study: Study, model: ICMoE) -> Numbers:
    """Return the validation score of the incoming model as it may leave."""
    scores = score_slices(model, site.val, study.labels, site.cache(study), site.torch_device(), surfaces=False)
    mean = math.fsum(score.dice for score in scores) / len(scores) if scores else 0.0
    return {DICE_KEY: mean, PATIENTS_KEY: len(scores)}

"""What a site computes in one round and the numbers about it that may leave, with and without differential privacy.

Under privacy at the site n_k is the study's public constant, the usage comes noised with the tensors, and loss, seconds
(they tell how many patients were drawn) and, unless noised, scores stay at the site.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from fl_client.manifest import Numbers
from fl_client.participant import Participant
from icmoe.dataset import TrainingSet
from icmoe.evaluation import score_slices
from icmoe.exchange import announced_size
from icmoe.messages import DICE_KEY, LOSS_KEY, PATIENTS_KEY, SECONDS_KEY, SLICES_KEY, STEPS_KEY, USAGE_KEY
from icmoe.model import ICMoE
from icmoe.privacy import noised_score, private_round
from icmoe.study import Study, derived_seed
from icmoe.training import train_round


def size_of(site: Participant, study: Study) -> int:
    """Return n_k as it leaves: slices rounded up to ten, exact in a simulation, a public constant under privacy."""
    privacy = study.privacy.site
    return announced_size(len(site.train), exact=site.exact_counts) if privacy is None else privacy.patients


def train_here(site: Participant, study: Study, model: ICMoE, round_number: int, on_step: Callable[[int, int], None]) -> Numbers:
    """Train the model in place for one round and return the numbers that leave with its update.

    `on_step` is called with steps done and steps in all.

    Raises
    ------
    IcmoeError
        As `train_round` or `private_round`.
    """
    data = TrainingSet(site.train, study, site.cache(study))
    device = site.torch_device()
    if study.privacy.site is not None:
        result = private_round(model, data, study, round_number=round_number, device=device, on_step=on_step)
        return {SLICES_KEY: size_of(site, study), USAGE_KEY: list(result.usage_M), STEPS_KEY: result.steps}
    seed = derived_seed(study, "train", site.name, round_number)
    steps = site.steps_per_round
    result = train_round(model, data, study, round_number=round_number, seed=seed, device=device, steps=steps, on_step=on_step)
    assert result.loss is not None
    return {
        SLICES_KEY: size_of(site, study),
        USAGE_KEY: list(result.usage_M),
        LOSS_KEY: result.loss,
        STEPS_KEY: result.steps,
        SECONDS_KEY: result.train_s,
    }


def validation_numbers(site: Participant, study: Study, model: ICMoE) -> Numbers:
    """Return the validation score of the incoming model as it may leave: nothing where privacy withholds it."""
    privacy = study.privacy.site
    if privacy is not None and privacy.scores == "withheld":
        return {}
    scores = score_slices(model, site.val, study.labels, site.cache(study), site.torch_device(), surfaces=False)
    if privacy is not None:
        dice, patients = noised_score([score.dice for score in scores], privacy)
        return {DICE_KEY: dice, PATIENTS_KEY: patients}
    mean = math.fsum(score.dice for score in scores) / len(scores) if scores else 0.0
    return {DICE_KEY: mean, PATIENTS_KEY: len(scores)}

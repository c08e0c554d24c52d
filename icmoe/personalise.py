"""A site's own model, made at the site once the federation has ended, so that joining does not leave it worse off.

    global   the federation's final model
    tuned    the global model after a few more steps on the site's own images
    own      what the site trains alone, from the study's start and with the study's settings

The default is the mean of the three models' probabilities. It needs no choice: on some patients the tuned model is best, on
others, who resemble the other hospitals', the global one, and a mean is never far from the better. Another candidate takes
its place only where the site's validation patients agree: better for each of them, and by `MARGIN` on average. With two or
three patients the best of many candidates is mostly luck, so a choice has to be earned; and since `own` is among the
candidates, a federation that harms every patient is left. What was tried stands in simulations/evidence/LOG.md.

A site whose training images lack a class of the study takes the global model as it is: what it trains itself unlearns that
class, and its validation patients, who may lack it too, cannot tell.
Nothing of this leaves the site.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch

from icmoe.data.slices import Slice
from icmoe.dataset import TrainingSet, untaught_classes
from icmoe.evaluation import score_slices
from icmoe.exchange import State, global_state, load_state
from icmoe.features import FeatureCache
from icmoe.mixture import mixture_of
from icmoe.model import build_model, model_of
from icmoe.study import Study, derived_seed, taught_alone
from icmoe.training import train_round

GLOBAL, TUNED, OWN = "global", "tuned", "own"
CANDIDATES: dict[str, dict[str, float]] = {
    "all three": {GLOBAL: 1 / 3, TUNED: 1 / 3, OWN: 1 / 3},
    "global and tuned": {GLOBAL: 0.5, TUNED: 0.5},
    "global": {GLOBAL: 1.0},
    "tuned": {TUNED: 1.0},
    "own": {OWN: 1.0},
}
"""Weights of the members, the default first."""
MARGIN = 0.01
"""Dice by which a candidate must beat the default."""
TUNING_EPOCHS = 1
"""Passes over the site's images that make `tuned`; more of them fit the training patients and lose others."""
TUNING_RATE = 0.3
"""Peak learning rate of the tuning as a share of the study's; it falls by half a cosine."""

OnRound = Callable[[State, int], None]
"""Called with the tensors and the rounds done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnData:
    """What a site brings.

    Parameters
    ----------
    site
        Name; part of the seeds.
    train, val
        Slices whose features are cached.
    cache
        Where.
    device
        CPU or CUDA.
    """

    site: str
    train: Sequence[Slice]
    val: Sequence[Slice]
    cache: FeatureCache
    device: torch.device


@dataclass(frozen=True, slots=True, kw_only=True)
class Personal:
    """A site's own model and why it was chosen.

    Parameters
    ----------
    choice
        Key of `CANDIDATES`.
    weights
        Of its members.
    states
        Tensors of its members.
    val_dice
        Dice of each validation patient by candidate; empty lists without such patients.
    untaught
        Names of the classes that no training image of the site shows; with any, the choice is the global model.
    """

    choice: str
    weights: dict[str, float]
    states: dict[str, State]
    val_dice: dict[str, list[float]]
    untaught: tuple[str, ...] = ()


def tune(state: State, study: Study, data: OwnData) -> State:
    """Return the global tensors after `TUNING_EPOCHS` passes over the site's training slices.

    Parameters
    ----------
    state
        Final global tensors.
    study
        The study they come from.
    data
        The site's.
    """
    training = study.training.model_copy(
        update={
            "local_epochs": TUNING_EPOCHS,
            "learning_rate": study.training.learning_rate * TUNING_RATE,
            "schedule": "cosine",
            "proximal_mu": 0.0,
        }
    )
    short = study.model_copy(update={"rounds": 1, "training": training})
    model = model_of(study, state).to(data.device)
    seed = derived_seed(study, "tune", data.site)
    train_round(model, TrainingSet(data.train, study, data.cache), short, round_number=1, seed=seed, device=data.device)
    return global_state(model)


def train_alone(
    study: Study, data: OwnData, *, state: State | None = None, done: int = 0, on_round: OnRound = lambda *_: None
) -> State:
    """Return what the site trains alone: the study's start, rounds and batches, without anybody else.

    Parameters
    ----------
    study
        Rounds, training, losses.
    data
        The site's.
    state, done
        Tensors after the first `done` rounds, where training goes on.
    on_round
        Called after each round.
    """
    model = build_model(study, seed=derived_seed(study, "model"))
    if state is not None:
        load_state(model, state)
    model.to(data.device)
    study = taught_alone(study)
    slices = TrainingSet(data.train, study, data.cache)
    for number in range(done + 1, study.rounds + 1):
        seed = derived_seed(study, "train", data.site, number)
        train_round(model, slices, study, round_number=number, seed=seed, device=data.device)
        on_round(global_state(model), number)
    return global_state(model)


def choose(val_dice: Mapping[str, Sequence[float]], default: str) -> str:
    """Return the candidate to use: the default, or the best of those that beat it for every patient and by `MARGIN`.

    Parameters
    ----------
    val_dice
        Dice of the same validation patients by candidate, possibly none.
    default
        A key of it.
    """
    base = val_dice[default]
    better = {
        name: fmean(dice)
        for name, dice in val_dice.items()
        if dice and all(mine > theirs for mine, theirs in zip(dice, base, strict=True)) and fmean(dice) >= fmean(base) + MARGIN
    }
    return max(better, key=lambda name: better[name]) if better else default


def personalise(study: Study, states: Mapping[str, State], data: OwnData) -> Personal:
    """Return the site's own model, chosen among `CANDIDATES`.

    Parameters
    ----------
    study
        Of the models.
    states
        Tensors of `global`, `tuned` (from `tune`) and `own` (from `train_alone`).
    data
        The site's.
    """
    val_dice = {name: _dice(study, states, weights, data) for name, weights in CANDIDATES.items()}
    untaught = tuple(study.labels[index].name for index in untaught_classes(data.train, study.classes))
    choice = GLOBAL if untaught else choose(val_dice, next(iter(CANDIDATES)))
    weights = CANDIDATES[choice]
    members = {name: states[name] for name in weights}
    return Personal(choice=choice, weights=weights, states=members, val_dice=val_dice, untaught=untaught)


def _dice(study: Study, states: Mapping[str, State], weights: Mapping[str, float], data: OwnData) -> list[float]:
    model = mixture_of(study, states, weights).to(data.device)
    scores = score_slices(model, data.val, study.labels, data.cache, data.device, surfaces=False)
    return [score.dice for score in scores]

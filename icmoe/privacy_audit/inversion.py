"""Gradient inversion: how far a patient's features can be read back from what a step releases.

The simplest known attack (Zhu et al., arXiv 1906.08935, by L-BFGS; with the cosine of Geiping et al., arXiv
2003.14053, since clipping hides the length): random features are changed until their gradient points where the release
points. The attacker gets the easiest case: a step of one patient with one slice, the labels and the model. Where a guess leads
nowhere another one may lead to the picture, so that it begins anew several times and keeps what fits the release best.
Shapes: D trained coordinates, B = 1, C channels, H x W grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from icmoe.clipping import noised
from icmoe.dataset import Batch
from icmoe.features import Features
from icmoe.model import ICMoE
from icmoe.patient_gradients import Objective, back_end_for
from icmoe.privacy import only_trained, private_sum
from icmoe.privacy_audit.seeded import SeededRows, each_patient
from icmoe.study import Study
from icmoe.training import anchor_of

_HISTORY = 50
_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Inversion:
    """How near the features come.

    Parameters
    ----------
    cosine, psnr_db
        Of the embedding read back and the true one; PSNR against the range of the true one.
    random_cosine, random_psnr_db
        Of the random features that the attack began with.
    mismatch
        One minus the cosine of the gradients, of the release and of what was read back: the attacker's own measure, the only
        one by which a start is chosen.
    starts
        Guesses that the attack began with.
    iterations
        Most steps from each.
    """

    cosine: float
    psnr_db: float
    random_cosine: float
    random_psnr_db: float
    mismatch: float
    starts: int
    iterations: int


def invert_gradient(
    model: ICMoE,
    study: Study,
    data: SeededRows,
    *,
    sigma: float,
    iterations: int,
    seed: int,
    starts: int = 1,
    on_start: Callable[[int], None] = lambda _: None,
) -> Inversion:
    """Attack the release of one step with the first slice of the first patient alone.

    Parameters
    ----------
    model
        The model that the step starts from; its tensors stay as they are.
    study
        Losses, and the privacy of the site where it has one: the gradient is clipped and noised then.
    data
        Patients.
    sigma
        Noise multiplier; of no account without privacy at the site.
    iterations
        Most steps from each guess.
    seed
        Of the guesses and of router noise.
    starts
        Guesses to begin with, at least 1.
    on_start
        Called with the number of each guess, from 1.
    """
    victim = SeededRows(data.read(data.rows_of_patients[0][:1], (), _CPU), [1])
    # Another stream than that of the seeded patients, or an equal seed would guess them.
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence((seed, 1)).generate_state(1)[0]))
    with only_trained(model, study):
        objective = Objective(model.train(), study.loss, generator, anchor_of(model, study))
        seen_D = _release(objective, study, victim, sigma)
        attempts = []
        for number in range(1, starts + 1):
            on_start(number)
            attempts.append(_attempt(objective, victim.batch, seen_D, iterations))
    model.eval()
    mismatch, start, found = min(attempts, key=lambda attempt: attempt[0])
    true = victim.batch.features.embedding_BCHW
    return Inversion(
        cosine=_cosine(found, true),
        psnr_db=_psnr_db(found, true),
        random_cosine=_cosine(start, true),
        random_psnr_db=_psnr_db(start, true),
        mismatch=mismatch,
        starts=starts,
        iterations=iterations,
    )


def _attempt(objective: Objective, batch: Batch, seen_D: Tensor, iterations: int) -> tuple[float, Tensor, Tensor]:
    """Return the mismatch that one guess leads to, infinite where it is no number, with the guess and what became of it."""
    guess = _drawn_like(batch.features, objective.generator)
    start = guess.embedding_BCHW.detach().clone()
    mismatch = _match(objective, guess, batch.target_BKhw, seen_D, iterations)
    return mismatch if math.isfinite(mismatch) else math.inf, start, guess.embedding_BCHW.detach()


def _release(objective: Objective, study: Study, victim: SeededRows, sigma: float) -> Tensor:
    """Return the gradient part of what the step releases, D."""
    privacy = study.privacy.site
    if privacy is None:
        return _gradient(objective, victim.batch).detach()
    sum_X = private_sum(objective, victim, each_patient(victim), privacy, _CPU, back_end_for(_CPU))
    return noised(sum_X, privacy, sigma)[: objective.coordinates]


def _match(objective: Objective, guess: Features, target_BKhw: Tensor, seen_D: Tensor, iterations: int) -> float:
    """Change the guess in place until its gradient points where the seen one does, and return how far it does not."""
    drawn = objective.generator.get_state()
    unknown = [guess.embedding_BCHW, *guess.blocks]
    optimizer = torch.optim.LBFGS(unknown, max_iter=iterations, history_size=_HISTORY, line_search_fn="strong_wolfe")

    def mismatch() -> float:
        optimizer.zero_grad(set_to_none=True)
        objective.generator.set_state(drawn)  # noise that came anew each time would lead the search astray
        gradient_D = _gradient(objective, Batch(guess, target_BKhw), create_graph=True)
        loss = 1.0 - F.cosine_similarity(gradient_D, seen_D, dim=0)
        loss.backward(inputs=unknown)
        return float(loss.detach())

    optimizer.step(mismatch)
    return mismatch()


def _gradient(objective: Objective, batch: Batch, *, create_graph: bool = False) -> Tensor:
    loss_B, _ = objective(batch)
    parameters = list(objective.trained().values())
    parts = torch.autograd.grad(loss_B.sum(), parameters, create_graph=create_graph, allow_unused=True, materialize_grads=True)
    return torch.cat([part.flatten() for part in parts])


def _drawn_like(features: Features, generator: torch.Generator) -> Features:
    def drawn(tensor: Tensor) -> Tensor:
        return (torch.randn(tensor.shape, generator=generator) * tensor.std() + tensor.mean()).requires_grad_()

    return features.each(drawn)


def _cosine(found: Tensor, true: Tensor) -> float:
    return float(F.cosine_similarity(found.flatten(), true.flatten(), dim=0))


def _psnr_db(found: Tensor, true: Tensor) -> float:
    span = float(true.max() - true.min())
    return float(10.0 * torch.log10(span**2 / (found - true).square().mean()))

"""DP-SGD with the patient as unit: a round of local training whose result is differentially private.

Each step draws patients by Poisson sampling, clips what each adds, adds noise and divides by a public constant; an empty
draw is a step of noise alone. The released tensors and the usage are functions of the noised sums, so they cost what
the steps cost, whatever optimiser and averaging follow (Abadi et al., arXiv 1607.00133). Adjacency: add or remove one
patient with all its slices. Neither loss nor gradient norm leaves. Shapes: P patients, D trained coordinates, M experts,
X = D + M.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from icmoe.accounting import training_spending
from icmoe.adamw import AdamW
from icmoe.batch_independence import mixing_faults
from icmoe.clipping import clipped_sum, noised, usage_of
from icmoe.dataset import TrainingSet
from icmoe.errors import NOTHING_SENT, Fault, IcmoeError
from icmoe.model import ICMoE
from icmoe.os_random import gaussian, torch_generator
from icmoe.parts import Parts
from icmoe.patient_batches import Sample, draw_samples, grouped
from icmoe.patient_gradients import BackEnd, Objective, back_end_for
from icmoe.study import Study
from icmoe.study_privacy import SitePrivacy
from icmoe.training import RoundResult, anchor_of, learning_rate, require_finite


def private_round(
    model: ICMoE,
    data: TrainingSet,
    study: Study,
    *,
    round_number: int,
    device: torch.device,
    on_step: Callable[[int, int], None] | None = None,
) -> RoundResult:
    """Train `model` in place for one round under the study's privacy at the site; there is no seed to repeat it with.

    Parameters
    ----------
    model
        Holds the round's global tensors on entry, on `device`.
    data
        The site's training slices.
    study
        With a section [privacy.site].
    round_number
        From 1; places the round in the learning-rate schedule.
    device
        CPU or CUDA, always in float32.
    on_step
        Called with (steps done, steps in all).

    Raises
    ------
    IcmoeError
        402 where the site's patients do not fit, 403 where no noise keeps the target, 404 where something mixes samples,
        304 where the model is not finite afterwards.
    """
    privacy = study.privacy.site
    assert privacy is not None
    if faults := [*patient_faults(privacy, len(data.rows_of_patients)), *mixing_faults(model, study)]:
        raise IcmoeError(*faults)
    sigma = training_spending(privacy, rounds=study.rounds).noise_multiplier
    began = time.perf_counter()
    model.train()
    model.start_round()
    with only_trained(model, study):
        objective = Objective(model, study.loss, torch_generator(device), anchor_of(model, study))
        descent = _Descent(objective.trained(), study, privacy)
        usage_M = torch.zeros(study.model.experts, dtype=torch.float64, device=device)
        parts = Parts(privacy.slices_at_once)
        for step in range(privacy.steps):
            mean_X = private_mean(objective, data, privacy, sigma, device, back_end_for(device), parts)
            gradient_D, step_usage_M = mean_X.tensor_split([objective.coordinates])
            usage_M += step_usage_M
            rate = learning_rate(study, round_number=round_number, step=step, steps=privacy.steps)
            descent.step(gradient_D, rate, last=privacy.steps - step)
            if on_step is not None:
                on_step(step + 1, privacy.steps)
        descent.finish()
    model.eval()
    require_finite(model)
    usage = usage_of(usage_M / privacy.steps, privacy)
    return RoundResult(loss=None, terms={}, usage_M=usage, steps=privacy.steps, train_s=time.perf_counter() - began)


def private_mean(
    objective: Objective,
    data: TrainingSet,
    privacy: SitePrivacy,
    sigma: float,
    device: torch.device,
    back_end: BackEnd,
    parts: Parts | None = None,
) -> Tensor:
    """Return the release of one step, X: patients are drawn, clipped, added, noised and divided by the public batch.

    Where memory is short the same patients are added up anew in smaller parts: nobody is drawn a second time.

    Parameters
    ----------
    objective
        The loss.
    data
        The site's training slices.
    privacy
        Rate, norms and divisor.
    sigma
        Noise multiplier.
    device
        Where gradients are computed.
    back_end
        How.
    parts
        How many slices at once, which it lowers where memory is short; the study's number where None.
    """
    samples = draw_samples(data.rows_of_patients, privacy.sample_rate, slices=privacy.slices_per_patient, views=len(data.views))

    def add_up(at_once: int) -> Tensor:
        return private_sum(objective, data, samples, privacy.model_copy(update={"slices_at_once": at_once}), device, back_end)

    return noised((parts or Parts(privacy.slices_at_once)).run(add_up), privacy, sigma)


def private_sum(
    objective: Objective,
    data: TrainingSet,
    samples: Sequence[Sample],
    privacy: SitePrivacy,
    device: torch.device,
    back_end: BackEnd,
) -> Tensor:
    """Return the clipped sum of the drawn patients, X; zeros where nobody was drawn.

    One patient more or less changes it by at most `privacy.sensitivity`.
    """
    sum_X = torch.zeros(objective.coordinates + objective.model.shape.experts, device=device)
    for group in grouped(samples, privacy.slices_at_once):
        rows = [row for sample in group for row in sample.rows]
        views = [view for sample in group for view in sample.views]
        batch = data.read(rows, views, device)
        counts = [len(sample.rows) for sample in group]
        for gradient_PD, usage_PM in back_end(objective, batch, counts, privacy.slices_at_once):
            sum_X += clipped_sum(gradient_PD, usage_PM, privacy)
    return sum_X


def patient_faults(privacy: SitePrivacy, patients: int) -> list[Fault]:
    """Return why a site with so many training patients cannot keep the study's promise; empty where it can."""
    faults = []
    if patients < privacy.expected_batch:
        limit = f"at least the expected batch of {privacy.expected_batch:g}"
        faults.append(
            Fault(number=402, what="site has fewer patients than the batch", value=str(patients), limit=limit, did=NOTHING_SENT)
        )
    if privacy.delta * patients > 1.0:
        what, value = "delta is larger than 1 / patients of the site", f"{privacy.delta:g}"
        faults.append(Fault(number=402, what=what, value=value, limit=f"at most {1.0 / patients:g}", did=NOTHING_SENT))
    return faults


def noised_score(scores: Sequence[float], privacy: SitePrivacy) -> tuple[float, int]:
    """Return the noised mean of validation scores and a noised number of patients, at least 1.

    Sum of (score - 1/2) * 2 and number are released together: one patient changes the pair by at most sqrt(2).

    Parameters
    ----------
    scores
        One per patient, in [0, 1].
    privacy
        The noise.
    """
    noise = gaussian(2) * privacy.score_noise * 2.0**0.5
    total = sum(2.0 * min(max(score, 0.0), 1.0) - 1.0 for score in scores) + noise[0]
    patients = max(1.0, len(scores) + noise[1])
    return float(min(max(0.5 + 0.5 * total / patients, 0.0), 1.0)), round(patients)


@contextmanager
def only_trained(model: ICMoE, study: Study) -> Iterator[None]:
    """Exclude what the study does not train, so that it gets no noise either.

    Yields
    ------
    None
    """
    untrained: tuple[str, ...] = () if study.loss.contrast else ("project.", "prototypes_KD")
    if study.privacy.site is not None and study.privacy.site.frozen_router:
        untrained = (*untrained, "router.")
    frozen = [tensor for name, tensor in model.named_parameters() if tensor.requires_grad and name.startswith(untrained)]
    for tensor in frozen:
        tensor.requires_grad = False
    try:
        yield
    finally:
        for tensor in frozen:
            tensor.requires_grad = True


class _Descent:
    """The optimiser behind the noise, and the mean of its last iterates: post-processing, free of any budget."""

    def __init__(self, trained: dict[str, nn.Parameter], study: Study, privacy: SitePrivacy) -> None:
        self.parameters = list(trained.values())
        self.start = [parameter.detach().clone() for parameter in self.parameters]
        self.mu = study.training.proximal_mu
        self.averaged = round(privacy.average_last * privacy.steps)
        self.mean: list[Tensor] | None = None
        self.count = 0
        decay = study.training.weight_decay
        self._move: Callable[[float], None]
        if privacy.optimizer == "sgd":
            self._move = partial(_sgd_step, torch.optim.SGD(self.parameters, momentum=0.9, weight_decay=decay))
        else:
            self._move = AdamW(self.parameters, weight_decay=decay, fused=self.parameters[0].is_cuda).step

    def step(self, gradient_D: Tensor, rate: float, *, last: int) -> None:
        """Take one step at a learning rate; `last` counts the steps that are left, this one included."""
        sizes = [parameter.numel() for parameter in self.parameters]
        for parameter, start, part in zip(self.parameters, self.start, gradient_D.split(sizes), strict=True):
            # The pull towards the global tensors knows no patient: it needs neither clipping nor noise.
            parameter.grad = part.view_as(parameter) + self.mu * (parameter.detach() - start)
        self._move(rate)
        if last <= self.averaged:
            self.count += 1
            now = [parameter.detach() for parameter in self.parameters]
            if self.mean is None:
                self.mean = [tensor.clone() for tensor in now]
            torch._foreach_lerp_(self.mean, now, 1.0 / self.count)

    def finish(self) -> None:
        """Put the mean of the last iterates in place, and leave no gradient behind."""
        for index, parameter in enumerate(self.parameters):
            parameter.grad = None
            if self.mean is not None:
                parameter.data.copy_(self.mean[index])


def _sgd_step(optimizer: torch.optim.SGD, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()

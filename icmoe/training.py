"""One round of local training on cached features; the same code on CPU and CUDA.

The loop never waits for the device: losses and usage are summed there and read once at the end. Where memory does not
suffice for a batch, its gradient is computed in parts (`icmoe/parts.py`).
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from icmoe.adamw import AdamW
from icmoe.dataset import Batch, TrainingSet
from icmoe.errors import Fault, IcmoeError
from icmoe.losses import proximal
from icmoe.model import ICMoE, total_loss
from icmoe.parts import Parts
from icmoe.router import Router
from icmoe.study import Study

WARM_UP_STEPS = 5
FINAL_RATE = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundResult:
    """What a round of local training measured.

    Parameters
    ----------
    loss
        Mean weighted loss over the steps; None where differential privacy withholds it.
    terms
        Mean of each loss term, unweighted; empty where they are withheld.
    usage_M
        Share of gate mass each expert received, on the simplex; empty without experts.
    steps
        Steps taken.
    train_s
        Seconds.
    """

    loss: float | None
    terms: dict[str, float]
    usage_M: tuple[float, ...]
    steps: int
    train_s: float


def learning_rate(study: Study, *, round_number: int, step: int, steps: int) -> float:
    """Return the rate of one step: cosine over all rounds, a short warm-up in each because the optimiser starts anew.

    Parameters
    ----------
    study
        Peak rate, schedule, rounds.
    round_number
        From 1.
    step
        From 0 within the round.
    steps
        Steps of the round.
    """
    rate = study.training.learning_rate * min(1.0, (step + 1) / WARM_UP_STEPS)
    if study.training.schedule == "constant":
        return rate
    done = (round_number - 1 + step / steps) / study.rounds
    return rate * (FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * done)))


def train_round(
    model: ICMoE,
    data: TrainingSet,
    study: Study,
    *,
    round_number: int,
    seed: int,
    device: torch.device,
    steps: int | None = None,
    pull_to: Sequence[Tensor] | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> RoundResult:
    """Train `model` in place for one round.

    Parameters
    ----------
    model
        Holds the round's global tensors on entry, on `device`.
    data
        The site's training slices.
    study
        Loss weights and training settings.
    round_number
        From 1; places the round in the learning-rate schedule.
    seed
        Of order, views, router noise and contrast anchors. On one machine, CPU and thread count the same seed gives the same
        bytes, where memory suffices for as many slices at once; on CUDA the gradients of bilinear interpolation and of
        gathering add up in any order.
    device
        CPU or CUDA; autocast to bfloat16 on CUDA.
    steps
        Number of steps; `local_epochs` passes where None.
    pull_to
        Where the proximal term pulls the trained tensors, in their order; to where they start if None.
    on_step
        Called with (steps done, steps in all).

    Raises
    ------
    IcmoeError
        304 where the loss or the model is not finite; the update must not be used then.
    """
    steps = steps or data.steps(study.training.local_epochs)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    start = pull_to or ([parameter.detach().clone() for parameter in trained] if study.training.proximal_mu > 0.0 else [])
    anchor = anchor_of(model, study)
    optimizer = AdamW(trained, weight_decay=study.training.weight_decay, fused=device.type == "cuda")
    noise = torch.Generator(device).manual_seed(seed)
    gradient = _Gradient(model, study, trained, start, anchor, noise, data.unknown)
    parts, sums = Parts(data.batch_size), _Sums()
    model.train()
    model.start_round()
    began = time.perf_counter()
    step = 0
    for batch in data.batches(steps=steps, seed=seed, device=device):
        measured = parts.run(partial(gradient.of, batch, noise.get_state()))
        torch.nn.utils.clip_grad_norm_(trained, study.training.clip_norm)
        optimizer.step(learning_rate(study, round_number=round_number, step=step, steps=steps))
        for part in measured:
            sums.add(part)
        del batch  # before the next one is made; `enumerate` would hold it as well
        step += 1  # noqa: SIM113
        if on_step is not None:
            on_step(step, steps)
    model.eval()
    result = sums.result(steps, began)
    require_finite(model)  # the last step may have broken it, after the loss was taken
    return result


def require_finite(model: ICMoE) -> None:
    """Refuse a model that training broke; waits for its device once.

    Raises
    ------
    IcmoeError
        304 where a parameter is not finite.
    """
    if not bool(torch.stack([torch.isfinite(tensor).all() for tensor in model.parameters()]).all()):
        raise IcmoeError(Fault(number=304, what="the trained model is not finite", did="The round's update was not sent."))


def anchor_of(model: ICMoE, study: Study) -> Router | None:
    """Return a frozen copy of the round's global router, where the loss has an anchor."""
    if not (study.loss.router_anchor and model.shape.experts):
        return None
    return copy.deepcopy(model.router).requires_grad_(requires_grad=False)


@dataclass(frozen=True, slots=True)
class _Measured:
    """One part of a batch, on the device: its share of the batch, loss, terms, and gate mass per expert."""

    share: float
    loss: Tensor
    terms: dict[str, Tensor]
    usage_M: Tensor | None


@dataclass(frozen=True, slots=True)
class _Gradient:
    """The gradient of a batch, in one part or, where memory is short, in several whose gradients add up.

    To the same where nothing is drawn: parts draw router noise and anchors in another order than a whole batch.
    """

    model: ICMoE
    study: Study
    trained: Sequence[Tensor]
    start: Sequence[Tensor]
    anchor: Router | None
    generator: torch.Generator
    unknown: Sequence[int]

    def of(self, batch: Batch, state: Tensor, at_once: int) -> list[_Measured]:
        """Leave the batch's gradient in the trained tensors and return what was measured; draws begin at the generator's state.

        An attempt that memory did not suffice for has drawn already, which no later draw shall hang on.
        """
        self.generator.set_state(state)
        for tensor in self.trained:
            tensor.grad = None
        return [self._part(batch, at, min(at + at_once, len(batch))) for at in range(0, len(batch), at_once)]

    def _part(self, batch: Batch, start: int, end: int) -> _Measured:
        part, share, weights = batch.part(start, end), (end - start) / len(batch), self.study.loss
        device = part.target_BKhw.device.type
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            terms, output = self.model.losses(part.features, part.target_BKhw, weights, self.generator, self.anchor, self.unknown)
            loss = total_loss(terms, weights)
        if self.study.training.proximal_mu > 0.0:
            loss = loss + self.study.training.proximal_mu * proximal(self.trained, self.start)
        (loss * share).backward()
        gates_BMHW = None if output.experts is None else output.experts.gates_BMHW.detach()
        usage_M = None if gates_BMHW is None else gates_BMHW.double().mean(dim=(0, 2, 3))
        return _Measured(share, loss.detach(), {name: value.detach().mean() for name, value in terms.items()}, usage_M)


class _Sums:
    """Running sums of a round, kept on the device."""

    def __init__(self) -> None:
        self.loss = torch.zeros(())
        self.terms: dict[str, Tensor] = {}
        self.usage_M: Tensor | None = None

    def add(self, part: _Measured) -> None:
        self.loss = self.loss.to(part.loss.device) + part.share * part.loss
        for name, value in part.terms.items():
            self.terms[name] = self.terms.get(name, 0.0) + part.share * value
        if part.usage_M is not None:
            usage_M = part.share * part.usage_M
            self.usage_M = usage_M if self.usage_M is None else self.usage_M + usage_M

    def result(self, steps: int, began: float) -> RoundResult:
        loss = self.loss.item() / steps  # waits for the device, which may have much to do yet
        train_s = time.perf_counter() - began
        if not math.isfinite(loss):
            raise IcmoeError(
                Fault(number=304, what="the training loss is not finite", value=str(loss), did="The round's update was not sent.")
            )
        usage: tuple[float, ...] = ()
        if self.usage_M is not None:
            usage = tuple((self.usage_M / self.usage_M.sum()).tolist())
        terms = {name: value.item() / steps for name, value in self.terms.items()}
        return RoundResult(loss=loss, terms=terms, usage_M=usage, steps=steps, train_s=train_s)

"""Gradient and usage of each patient, by two back ends that agree: one patient after the other, or all at once.

The loop is the reference: any module, least memory, fastest on a CPU. The other maps the gradient over the slices
(`torch.func`), for a GPU. Opacus' hooks cannot be used here: the model reads `up` and vote head weights outside
their layers' forward (`ICMoE._mix`), where a hook sees nothing. Shapes: B slices, P patients, D trained coordinates, M
experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from icmoe.dataset import Batch
from icmoe.features import Features
from icmoe.model import ICMoE
from icmoe.router import Router
from icmoe.study import LossWeights

Block = tuple[Tensor, Tensor]
BackEnd = Callable[["Objective", Batch, Sequence[int], int], Iterator[Block]]


class Objective(nn.Module):
    """Weighted loss and usage of each slice, as one differentiable function of the trained parameters.

    Parameters
    ----------
    model
        In training mode.
    weights
        Loss weights.
    generator
        Source of router noise and anchors.
    anchor_router
        The round's global router, where the loss has an anchor.
    """

    def __init__(
        self, model: ICMoE, weights: LossWeights, generator: torch.Generator, anchor_router: Router | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.weights = weights
        self.generator = generator
        self.anchor_router = anchor_router

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return loss B and usage B M, on the simplex without gradient."""
        terms, output = self.model.losses(batch.features, batch.target_BKhw, self.weights, self.generator, self.anchor_router)
        loss_B = torch.stack([getattr(self.weights, name) * value_B for name, value_B in terms.items()]).sum(dim=0)
        if output.experts is None:
            return loss_B, loss_B.new_zeros(len(loss_B), 0)
        return loss_B, output.experts.gates_BMHW.detach().mean(dim=(2, 3))

    @property
    def coordinates(self) -> int:
        """Number D of trained coordinates."""
        return sum(parameter.numel() for parameter in self.trained().values())

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the parameters that get a gradient, in the order of the coordinates."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}


def one_by_one(objective: Objective, batch: Batch, counts: Sequence[int], slices_at_once: int) -> Iterator[Block]:
    """Yield gradient and usage of one patient after the other, 1 D and 1 M.

    Parameters
    ----------
    objective
        The loss.
    batch
        Slices of a group of patients.
    counts
        Slices of each patient, in order.
    slices_at_once
        Most slices in one pass.
    """
    parameters = list(objective.trained().values())
    end = 0
    for count in counts:
        start, end = end, end + count
        gradient_D, usage_M = None, None
        for at in range(start, end, slices_at_once):
            loss_B, usage_BM = objective(batch.part(at, min(at + slices_at_once, end)))
            part = torch.autograd.grad(loss_B.sum() / count, parameters, allow_unused=True, materialize_grads=True)
            part_D, part_M = torch.cat([tensor.flatten() for tensor in part]), usage_BM.sum(dim=0) / count
            gradient_D = part_D if gradient_D is None else gradient_D + part_D
            usage_M = part_M if usage_M is None else usage_M + part_M
        assert gradient_D is not None
        assert usage_M is not None
        yield gradient_D[None], usage_M[None]


def all_at_once(objective: Objective, batch: Batch, counts: Sequence[int], slices_at_once: int) -> Iterator[Block]:
    """Yield gradient and usage of all patients of the group, P D and P M; parameters as in `one_by_one`."""
    trained = {name: parameter.detach() for name, parameter in objective.trained().items()}

    def loss(parameters: dict[str, Tensor], features: Features, target_Khw: Tensor) -> tuple[Tensor, Tensor]:
        single = Batch(features.each(lambda tensor: tensor[None]), target_Khw[None])
        loss_B, usage_BM = functional_call(objective, parameters, (single,))
        return loss_B[0], usage_BM[0]

    def of_slice(embedding_CHW: Tensor, blocks: tuple[Tensor, ...], target_Khw: Tensor) -> tuple[Tensor, Tensor]:
        features = Features(embedding_CHW, blocks, batch.features.rest)
        gradients, usage_M = grad(loss, has_aux=True)(trained, features, target_Khw)
        return torch.cat([gradient.flatten() for gradient in gradients.values()]), usage_M

    mapped = vmap(of_slice, randomness="different", chunk_size=slices_at_once)
    gradient_BD, usage_BM = mapped(batch.features.embedding_BCHW, batch.features.blocks, batch.target_BKhw)
    count_P = torch.tensor(list(counts), device=gradient_BD.device)
    patient_B = torch.repeat_interleave(torch.arange(len(count_P), device=count_P.device), count_P)

    def per_patient(value_BX: Tensor) -> Tensor:
        sum_PX = value_BX.new_zeros(len(count_P), value_BX.shape[1]).index_add(0, patient_B, value_BX)
        return sum_PX / count_P[:, None]

    yield per_patient(gradient_BD), per_patient(usage_BM)


def back_end_for(device: torch.device) -> BackEnd:
    """Return the faster back end of a device."""
    return one_by_one if device.type == "cpu" else all_at_once

"""AdamW by PyTorch's own functional form, without its class.

Loshchilov and Hutter, arXiv 1711.05101. The class imports the compiler of PyTorch at its first step, compiled or not: more
than a second of CPU in every message of a site, which Flower answers in a fresh process (`python -X importtime` shows
`torch._dynamo`). The steps are the class's to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw

BETAS = (0.9, 0.999)
EPSILON = 1e-8


class AdamW:
    """AdamW over some tensors, with PyTorch's default betas and epsilon.

    Parameters
    ----------
    parameters
        What is trained; those without a gradient stay, and so do their moments.
    weight_decay
        Decoupled; times the rate at each step.
    fused
        Whether one kernel does it all: on CUDA.
    """

    def __init__(self, parameters: Sequence[Tensor], *, weight_decay: float, fused: bool) -> None:
        self._parameters, self._weight_decay, self._fused = list(parameters), weight_decay, fused
        self._means = [torch.zeros_like(tensor, memory_format=torch.preserve_format) for tensor in parameters]
        self._squares = [torch.zeros_like(tensor, memory_format=torch.preserve_format) for tensor in parameters]
        self._steps = [torch.zeros((), device=tensor.device if fused else "cpu") for tensor in parameters]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Take one step at a learning rate."""
        moved = [index for index, tensor in enumerate(self._parameters) if tensor.grad is not None]
        adamw(
            [self._parameters[index] for index in moved],
            [grad for index in moved if (grad := self._parameters[index].grad) is not None],
            [self._means[index] for index in moved],
            [self._squares[index] for index in moved],
            [],
            [self._steps[index] for index in moved],
            foreach=False,
            fused=self._fused,
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=rate,
            weight_decay=self._weight_decay,
            eps=EPSILON,
            maximize=False,
        )

"""SAMed: low-rank updates in the encoder's attention and the whole mask decoder trained (Zhang and Liu, arXiv 2304.13785).

LoRA: Hu et al., arXiv 2106.09685. TinyViT has attention in stages 1 to 3 and one matrix for query, key and value; the
update has rank 4 on the whole of it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from icmoe.tinyvit import WindowAttention

RANK = 4
"""R."""


class LowRank(nn.Module):
    """A frozen linear layer plus ``up down x``; equal to the layer at start because `up` is zero.

    Parameters
    ----------
    base
        The layer.
    """

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(requires_grad=False)
        bound = 1 / math.sqrt(base.in_features)
        self.down_RC = nn.Parameter(torch.empty(RANK, base.in_features).uniform_(-bound, bound))
        self.up_OR = nn.Parameter(torch.zeros(base.out_features, RANK))

    def forward(self, x_BLC: Tensor) -> Tensor:
        """Return B L O."""
        y_BLO: Tensor = self.base(x_BLC) + (x_BLC @ self.down_RC.T) @ self.up_OR.T
        return y_BLO


def add_low_rank(encoder: nn.Module) -> None:
    """Put a low-rank update beside the query-key-value matrix of every attention in `encoder`."""
    for module in list(encoder.modules()):
        if isinstance(module, WindowAttention):
            module.qkv = LowRank(module.qkv)  # type: ignore[assignment]

"""The router: per-pixel logits over the experts, noisy in training."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from icmoe.pointwise import Pointwise


class Router(nn.Module):
    """Token-choice router; each pixel scores every expert from its own feature, so no image depends on another.

    Parameters
    ----------
    channels
        Width C of the embedding.
    experts
        Number M of experts.
    bottleneck
        Hidden width.
    noise
        Standard deviation of the Gaussian added to the logits in training.
    """

    def __init__(self, channels: int, experts: int, bottleneck: int, noise: float) -> None:
        super().__init__()
        self.down = Pointwise(channels, bottleneck)
        self.score = Pointwise(bottleneck, experts)
        self.noise = noise

    def forward(self, x_BCHW: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return logits s, B M H W.

        Parameters
        ----------
        x_BCHW
            Normalised embedding.
        generator
            Source of the training noise; without one there is none.
        """
        s_BMHW: Tensor = self.score(F.gelu(self.down(x_BCHW)))
        if generator is None or self.noise == 0.0:
            return s_BMHW
        return s_BMHW + self.noise * torch.randn(s_BMHW.shape, generator=generator, device=s_BMHW.device, dtype=s_BMHW.dtype)

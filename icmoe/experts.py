"""The three kinds of experts of IC-MoE.

Shapes: B images, C channels of the embedding, b bottleneck, H x W grid, N = H W pixels, P prototypes.

Every expert maps the normalised embedding to a hidden map `hidden_BbHW`; its contribution is ``D_e = up(hidden)``.
`up` is linear per pixel, so gates and votes are applied to the narrow hidden map and `D_e` is never stored:
``sum_e g_e up_e(h_e)`` needs a quarter of the memory of ``sum_e g_e D_e`` and is equal to rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from icmoe.kinds import kinds_of
from icmoe.pointwise import Pointwise
from icmoe.study import ModelShape


class BasicExpert(nn.Module):
    """Local texture and edges: 1x1 down, depthwise 3x3.

    Parameters
    ----------
    channels
        Width C of the embedding.
    bottleneck
        Width b of the hidden map.
    """

    def __init__(self, channels: int, bottleneck: int) -> None:
        super().__init__()
        self.down = Pointwise(channels, bottleneck)
        self.local = nn.Conv2d(bottleneck, bottleneck, 3, padding=1, groups=bottleneck)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the hidden map, B b H W."""
        return F.gelu(self.local(F.gelu(self.down(x_BCHW))))


class SemanticExpert(nn.Module):
    """Global meaning: learned prototypes read the whole image and every pixel reads the prototypes.

    Both attentions are linear in the number of pixels.

    Parameters
    ----------
    channels
        Width C of the embedding.
    bottleneck
        Width b of the hidden map.
    prototypes
        Number P of learned class-level prototypes.
    """

    def __init__(self, channels: int, bottleneck: int, prototypes: int) -> None:
        super().__init__()
        self.down = Pointwise(channels, bottleneck)
        self.read = Pointwise(bottleneck, prototypes)
        self.think = nn.Linear(bottleneck, bottleneck)
        self.query = Pointwise(bottleneck, bottleneck)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the hidden map, B b H W."""
        h_BbHW: Tensor = F.gelu(self.down(x_BCHW))
        scale = h_BbHW.shape[1] ** -0.5
        h_BbN = h_BbHW.flatten(2)
        # The pointwise layer holds the prototypes as its weights: its output is each prototype's score of each pixel.
        share_BPN = (self.read(h_BbHW).flatten(2) * scale).softmax(dim=-1)
        meaning_BPb = F.gelu(self.think(share_BPN @ h_BbN.transpose(1, 2)))
        query_BbN = self.query(h_BbHW).flatten(2)
        answer_BPN = (meaning_BPb @ query_BbN * scale).softmax(dim=1)
        hidden_BbN: Tensor = h_BbN + meaning_BPb.transpose(1, 2) @ answer_BPN
        return hidden_BbN.view_as(h_BbHW)


class AdaptiveExpert(nn.Module):
    """Context at several scales, modulated (FiLM) by the image's own pooled vector.

    Parameters
    ----------
    channels
        Width C of the embedding.
    bottleneck
        Width b of the hidden map.
    """

    def __init__(self, channels: int, bottleneck: int) -> None:
        super().__init__()
        self.down = Pointwise(channels, bottleneck)
        self.scales = nn.ModuleList(
            nn.Conv2d(bottleneck, bottleneck, 3, padding=dilation, dilation=dilation, groups=bottleneck) for dilation in (1, 2, 4)
        )
        self.mix = Pointwise(bottleneck, bottleneck)
        self.modulate = nn.Linear(channels, 2 * bottleneck)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the hidden map, B b H W."""
        h_BbHW = F.gelu(self.down(x_BCHW))
        mixed_BbHW = self.mix(torch.stack([scale(h_BbHW) for scale in self.scales]).sum(dim=0))
        gain_Bb, shift_Bb = self.modulate(x_BCHW.mean(dim=(2, 3))).chunk(2, dim=1)
        return F.gelu(mixed_BbHW * (1 + gain_Bb[..., None, None]) + shift_Bb[..., None, None])


class Expert(nn.Module):
    """One expert: a body of one of the three kinds and the pointwise projection back to the embedding.

    Parameters
    ----------
    body
        `BasicExpert`, `SemanticExpert` or `AdaptiveExpert`.
    channels
        Width C of the embedding.
    bottleneck
        Width b of the hidden map.
    """

    def __init__(self, body: nn.Module, channels: int, bottleneck: int) -> None:
        super().__init__()
        self.body = body
        self.up = Pointwise(bottleneck, channels)
        # At start every D_e is zero, so that the untrained model is the plain backbone.
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the hidden map, B b H W; `D_e` is `up` of it."""
        hidden_BbHW: Tensor = self.body(x_BCHW)
        return hidden_BbHW


BODIES: dict[str, Callable[[int, int, int], nn.Module]] = {
    "basic": lambda channels, bottleneck, _: BasicExpert(channels, bottleneck),
    "semantic": SemanticExpert,
    "adaptive": lambda channels, bottleneck, _: AdaptiveExpert(channels, bottleneck),
}
"""What makes an expert of each kind (`icmoe.kinds.KINDS`) from the widths C and b and the number P of prototypes."""


def make_experts(shape: ModelShape, *, channels: int, classes: int) -> nn.ModuleList:
    """Return the experts that `shape` asks for, in the order of `icmoe.kinds.KINDS`.

    Parameters
    ----------
    shape
        Numbers of experts and width b.
    channels
        Width C.
    classes
        Number K of classes; a semantic expert holds 4 prototypes per class.
    """
    width = shape.bottleneck
    # All bodies before the projections, so that a seed gives what it gave.
    bodies = [BODIES[kind.name](channels, width, 4 * classes) for kind in kinds_of(shape)]
    return nn.ModuleList(Expert(body, channels, width) for body in bodies)

"""MSA: bottleneck adapters inside the frozen encoder's blocks (Wu et al., Medical SAM Adapter, arXiv 2304.12620).

One adapter behind the attention and one beside the perceptron, scaled by one half, in every attention block. Both are
zero at start. The decoder is the mask head alone, so that encoder adaptation is the only difference to that rival.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from icmoe.tinyvit import AttentionBlock

RATIO = 4
SCALE = 0.5


class Bottleneck(nn.Module):
    """Down to a quarter, GELU, up; zero at start.

    Parameters
    ----------
    channels
        C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down = nn.Linear(channels, channels // RATIO)
        self.up = nn.Linear(channels // RATIO, channels)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x_BLC: Tensor) -> Tensor:
        """Return B L C."""
        y_BLC: Tensor = self.up(F.gelu(self.down(x_BLC)))
        return y_BLC


class AfterAttention(nn.Module):
    """Attention, then y + Adapter(y)."""

    def __init__(self, base: nn.Module, channels: int) -> None:
        super().__init__()
        self.base, self.adapter = base, Bottleneck(channels)

    def forward(self, x_BLC: Tensor) -> Tensor:
        """Return B L C."""
        attended_BLC: Tensor = self.base(x_BLC)
        y_BLC: Tensor = attended_BLC + self.adapter(attended_BLC)
        return y_BLC


class BesidePerceptron(nn.Module):
    """Perceptron(x) + Adapter(x) / 2."""

    def __init__(self, base: nn.Module, channels: int) -> None:
        super().__init__()
        self.base, self.adapter = base, Bottleneck(channels)

    def forward(self, x_BLC: Tensor) -> Tensor:
        """Return B L C."""
        y_BLC: Tensor = self.base(x_BLC) + SCALE * self.adapter(x_BLC)
        return y_BLC


def add_adapters(encoder: nn.Module) -> None:
    """Put both adapters into every attention block of `encoder`."""
    for module in list(encoder.modules()):
        if isinstance(module, AttentionBlock):
            channels = module.attn.qkv.in_features
            module.attn = AfterAttention(module.attn, channels)  # type: ignore[assignment]
            module.mlp = BesidePerceptron(module.mlp, channels)  # type: ignore[assignment]

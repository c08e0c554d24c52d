"""One plain bottleneck adapter on the frozen features with as many parameters as IC-MoE: "more parameters, no experts"."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from icmoe.backbone import widths
from icmoe.model import build_model
from icmoe.pointwise import Pointwise
from icmoe.study import Study
from simulations.evidence.rivals.mask_head import PlainHead
from simulations.evidence.rivals.segmenter import trained_count


class FeatureAdapter(nn.Module):
    """Norm, 1x1 down, depthwise 3x3, 1x1 up; zero at start. The form of IC-MoE's basic expert, wide.

    Parameters
    ----------
    channels
        C, a multiple of 8.
    hidden
        Channels inside.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.down = Pointwise(channels, hidden)
        self.mix = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.up = Pointwise(hidden, channels)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return what is added to x."""
        added: Tensor = self.up(F.gelu(self.mix(F.gelu(self.down(self.norm(x_BCHW))))))
        return added


def width_like_ours(study: Study) -> int:
    """Return the hidden width with which head and adapter have as many parameters as IC-MoE, to the nearest channel."""
    channels = widths(study.backbone).channels
    fixed = trained_count(PlainHead(study)) + 3 * channels
    per_hidden = 2 * channels + 1 + 9 + 1
    return max(1, round((trained_count(build_model(study, seed=0)) - fixed) / per_hidden))


def adapter_head(study: Study) -> PlainHead:
    """Return the decoder."""
    channels = widths(study.backbone).channels
    return PlainHead(study, FeatureAdapter(channels, width_like_ours(study)))

"""Mask head alone: IC-MoE's laterals and mask head on the frozen features, no experts, router or contrast."""

from __future__ import annotations

from torch import Tensor, nn

from icmoe.backbone import widths
from icmoe.features import Features
from icmoe.model import Lateral, MaskHead
from icmoe.study import Study


class PlainHead(nn.Module):
    """x = E + laterals, then the mask head; an adapter may stand between.

    Parameters
    ----------
    study
        Classes and backbone.
    adapter
        From x to what is added to it.
    """

    def __init__(self, study: Study, adapter: nn.Module | None = None) -> None:
        super().__init__()
        channels, block_channels, _ = widths(study.backbone)
        self.lateral = Lateral(block_channels, channels) if block_channels else None
        self.adapter = adapter
        self.head = MaskHead(channels, study.classes)

    def forward(self, features: Features) -> Tensor:
        """Return logits on twice the backbone's grid."""
        x_BCHW = features.embedding_BCHW
        if self.lateral is not None:
            x_BCHW = x_BCHW + self.lateral(features.blocks)
        if self.adapter is not None:
            x_BCHW = x_BCHW + self.adapter(x_BCHW)
        logits_BKhw: Tensor = self.head(x_BCHW)
        return logits_BKhw

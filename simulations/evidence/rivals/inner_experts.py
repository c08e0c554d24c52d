"""IC-MoE's experts inside the encoder: on the tokens that enter the last stage, which stays frozen behind them.

What is cached is those tokens; a step runs the last stage and the neck forward and passes gradients back through them. Experts,
router, voting and losses are IC-MoE's, on 320 channels instead of 256; the mask head reads what comes out of the neck.
"""

from __future__ import annotations

import torch
from torch import nn

from icmoe.backbone import Backbone, widths
from icmoe.features import Features
from icmoe.model import ICMoE, Lateral, MaskHead, Output
from icmoe.study import Study
from icmoe.tinyvit import WIDTHS
from simulations.evidence.rivals.encoder import STAGES, tail


class InnerExperts(ICMoE):
    """Experts before the last stage, the mask head behind it.

    Parameters
    ----------
    study
        Shape, classes and backbone.
    backbone
        Its last stage and neck are copied and stay frozen.
    """

    def __init__(self, study: Study, backbone: Backbone) -> None:
        embedding, blocks = widths(study.backbone.name, block_features=study.backbone.block_features)
        tokens, seed = WIDTHS[-1], torch.initial_seed()
        super().__init__(study.model, classes=study.classes, channels=tokens, block_channels=blocks, seed=seed)
        self.behind = tail(backbone, STAGES - 1)
        self.lateral_behind = Lateral(blocks, embedding) if blocks else None
        self.head = MaskHead(embedding, study.classes)

    def forward(self, features: Features, generator: torch.Generator | None = None) -> Output:
        """Return logits, the tokens after the experts and the votes.

        Parameters
        ----------
        features
            Tokens that enter the last stage, B 320 H W, and the blocks before.
        generator
            Source of the router's noise in training; None in evaluation.
        """
        x_BCHW = features.embedding_BCHW
        if self.lateral is not None:
            x_BCHW = x_BCHW + self.lateral(features.blocks)
        y_BCHW, votes = self._mix(x_BCHW, generator) if self.shape.experts else (x_BCHW, None)
        embedding_BCHW = self.behind(Features(y_BCHW, ())).embedding_BCHW
        if self.lateral_behind is not None:
            embedding_BCHW = embedding_BCHW + self.lateral_behind(features.blocks)
        return Output(self.head(embedding_BCHW), y_BCHW, votes)


def inner_experts(study: Study, backbone: Backbone, _weights: object) -> nn.Module:
    """Return the model with weights drawn from torch's seed."""
    return InnerExperts(study, backbone)

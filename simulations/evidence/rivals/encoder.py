"""`lite-medsam` cut in two: a front that stays frozen and is computed once, a tail that a rival may train.

What reaches the tail is cached as features are (fp16, same rules), so a rival pays for the part that it trains and for
nothing else. Cut 0 keeps the image itself, cut 1 the output of the first stage, cut 3 that of the third.
"""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor, nn

from icmoe.backbone import Backbone, folded
from icmoe.features import FeatureCache, Features
from icmoe.tinyvit import TinyViT

STAGES = 4
TAPPED = 2


class Stages(nn.Module):
    """Some of TinyViT's stages, with the two tapped outputs projected as the backbone does it.

    Parameters
    ----------
    backbone
        Its encoder is a `TinyViT`; the parts are copied.
    first, last
        Stages first to last - 1; the patch embedding belongs to stage 0, the neck comes after stage 3.
    """

    def __init__(self, backbone: Backbone, first: int, last: int) -> None:
        super().__init__()
        source = cast("TinyViT", backbone.encoder)
        self.first, self.grid, self.image_size, self.rest = first, backbone.grid, backbone.image_size, None
        self.patch_embed = copy.deepcopy(source.patch_embed) if first == 0 and last > 0 else None
        self.layers = nn.ModuleList(copy.deepcopy(source.layers[index]) for index in range(first, last))
        self.neck = copy.deepcopy(source.neck) if last == STAGES else None
        for index in range(TAPPED):
            self.register_buffer(f"projection_{index}", getattr(backbone, f"projection_{index}").clone())
        self.requires_grad_(requires_grad=False)
        self.train(mode=False)

    def train(self, mode: bool = True) -> Stages:  # noqa: FBT001, FBT002  (torch's own signature)
        """Stay in evaluation mode: batch norm keeps the statistics that the weights came with."""
        del mode
        return super().train(mode=False)

    def forward(self, features: Features) -> Features:
        """Return what comes out of the stages; the blocks are those tapped up to here.

        Parameters
        ----------
        features
            The output of the stages before; B 1 S S images in [0, 1] where there are none.
        """
        x_BCHW, blocks = features.embedding_BCHW, list(features.blocks)
        if self.patch_embed is not None:
            x_BCHW = self.patch_embed(x_BCHW.expand(-1, 3, -1, -1))
        for index, stage in enumerate(self.layers, start=self.first):
            x_BCHW = stage(x_BCHW)
            if index < TAPPED:
                projection = getattr(self, f"projection_{index}")
                blocks.append(torch.einsum("oc,bchw->bohw", projection, folded(x_BCHW, self.grid)))
        return Features(x_BCHW if self.neck is None else self.neck(x_BCHW), tuple(blocks))

    @torch.no_grad()
    def encode(self, images_B3SS: Tensor) -> Features:
        """Return what the tail behind these stages is fed with; in place of `Backbone.encode` for `icmoe.prepare`."""
        output: Features = self(Features(images_B3SS[:, :1], ()))
        return output


def front(backbone: Backbone, cut: int) -> Stages:
    """Return the part before stage `cut`."""
    return Stages(backbone, 0, cut)


def tail(backbone: Backbone, cut: int) -> Stages:
    """Return the part from stage `cut` on, frozen; a rival sets free what it trains."""
    return Stages(backbone, cut, STAGES)


def front_cache(folder_of: FeatureCache, backbone: Backbone, cut: int) -> FeatureCache:
    """Return the cache of the front's outputs, beside the features and so under the same rules of access and deletion."""
    return FeatureCache(folder_of.folder, f"{backbone.digest}/stage{cut}", backbone.image_size, block_features=True)

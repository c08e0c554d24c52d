"""LiteMedSAM's own mask decoder, without any prompt, for K classes.

segment-anything's class with K mask tokens, each with its hypernetwork, all started from the published single-mask
token. Frozen form: transformer and upscaling stay as published and only tokens and hypernetworks are trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from icmoe.features import Features
from icmoe.sam import import_image_encoder

CHANNELS, HEADS, DEPTH, MLP_CHANNELS = 256, 8, 2, 2048
PREFIX, MATRIX, NO_MASK = (
    "mask_decoder.",
    "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
    "prompt_encoder.no_mask_embed.weight",
)


class SamDecoder(nn.Module):
    """The mask decoder on a batch of embeddings.

    Parameters
    ----------
    classes
        K.
    grid
        Side of the embedding.
    weights
        All of LiteMedSAM's tensors; the decoder keeps its random weights where None.
    whole
        Whether everything is trained, as SAMed does, or tokens and hypernetworks alone.
    """

    positions_1CHW: Tensor

    def __init__(self, classes: int, grid: int, weights: Mapping[str, Tensor] | None, *, whole: bool) -> None:
        super().__init__()
        import_image_encoder()  # makes the package importable where torchvision is absent
        from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer

        transformer = TwoWayTransformer(depth=DEPTH, embedding_dim=CHANNELS, mlp_dim=MLP_CHANNELS, num_heads=HEADS)
        self.sam: Any = MaskDecoder(transformer_dim=CHANNELS, transformer=transformer, num_multimask_outputs=classes - 1)
        self.sam.iou_prediction_head = nn.Identity()
        self.no_mask_1C = nn.Parameter(torch.zeros(1, CHANNELS))
        prompts = PromptEncoder(CHANNELS, (grid, grid), (4 * grid, 4 * grid), 16)
        if weights is not None:
            self.sam.load_state_dict(_for_classes(weights, classes), strict=True)
            self.no_mask_1C.data.copy_(weights[NO_MASK])
            prompts.pe_layer.positional_encoding_gaussian_matrix.copy_(weights[MATRIX])
        self.register_buffer("positions_1CHW", prompts.get_dense_pe().detach())
        self.requires_grad_(requires_grad=whole)
        self.sam.mask_tokens.requires_grad_(requires_grad=True)
        self.sam.output_hypernetworks_mlps.requires_grad_(requires_grad=True)

    def forward(self, features: Features) -> Tensor:
        """Return logits on four times the embedding's grid."""
        image_BCHW = features.embedding_BCHW + self.no_mask_1C[..., None, None]
        B, C, H, W = image_BCHW.shape
        tokens_TC = torch.cat([self.sam.iou_token.weight, self.sam.mask_tokens.weight])
        hidden_BTC, mixed_BNC = self.sam.transformer(
            image_BCHW, self.positions_1CHW.expand(B, -1, -1, -1), tokens_TC.expand(B, -1, -1)
        )
        upscaled_Bchw = self.sam.output_upscaling(mixed_BNC.transpose(1, 2).view(B, C, H, W))
        hyper_Bc = [mlp(hidden_BTC[:, 1 + index]) for index, mlp in enumerate(self.sam.output_hypernetworks_mlps)]
        return torch.einsum("bkc,bchw->bkhw", torch.stack(hyper_Bc, dim=1), upscaled_Bchw)


def _for_classes(weights: Mapping[str, Tensor], classes: int) -> dict[str, Tensor]:
    """Return the decoder's tensors with the single-mask token and its hypernetwork repeated for each class."""
    own = {name.removeprefix(PREFIX): value for name, value in weights.items() if name.startswith(PREFIX)}
    kept = {
        name: value
        for name, value in own.items()
        if not name.startswith(("mask_tokens", "output_hypernetworks", "iou_prediction"))
    }
    first = "output_hypernetworks_mlps.0."
    hyper = {name.removeprefix(first): value for name, value in own.items() if name.startswith(first)}
    repeated = {f"output_hypernetworks_mlps.{k}.{name}": value for k in range(classes) for name, value in hyper.items()}
    return {**kept, **repeated, "mask_tokens.weight": own["mask_tokens.weight"][:1].expand(classes, -1)}

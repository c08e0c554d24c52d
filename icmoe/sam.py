"""segment-anything's ViT image encoders: import without torchvision, any input size, faster attention, block outputs.

SAM: Kirillov et al., arXiv 2304.02643. The encoder class is segment-anything's own; only its attention is computed in
another order (`icmoe/sam_attention.py`). Shapes: B images, H x W tokens.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from icmoe.backbones import Architecture, Inner
from icmoe.sam_attention import SamAttention

PIXEL_MEAN = (123.675 / 255, 116.28 / 255, 103.53 / 255)
PIXEL_STD = (58.395 / 255, 57.12 / 255, 57.375 / 255)


@dataclass(frozen=True, slots=True, kw_only=True)
class VitShape:
    """Numbers of an encoder, as in segment-anything's factories.

    Parameters
    ----------
    width, depth, heads
        Of the transformer.
    global_blocks
        Blocks whose attention sees the whole image.
    taps
        Blocks whose outputs feed the laterals.
    patch
        Side of a patch, pixels.
    window
        Side of an attention window, tokens; 0 for none.
    out_channels
        Channels of the embedding.
    positions
        Whether absolute and relative positions are learned.
    """

    width: int
    depth: int
    heads: int
    global_blocks: tuple[int, ...]
    taps: tuple[int, ...]
    patch: int = 16
    window: int = 14
    out_channels: int = 256
    positions: bool = True

    @property
    def inner(self) -> int:
        """Index of the first block of the last stage: a transformer has none, so that it is what comes after the last tap."""
        return self.taps[-1] + 1


SHAPES = {
    "sam-vit-b": VitShape(width=768, depth=12, heads=12, global_blocks=(2, 5, 8, 11), taps=(2, 5, 8)),
    "sam-vit-l": VitShape(width=1024, depth=24, heads=16, global_blocks=(5, 11, 17, 23), taps=(5, 11, 17)),
    "sam-vit-h": VitShape(width=1280, depth=32, heads=16, global_blocks=(7, 15, 23, 31), taps=(7, 15, 23)),
    # Without positions its weights do not depend on the input size, so its digest is one constant.
    "sam-vit-test": VitShape(
        width=16, depth=2, heads=2, global_blocks=(0, 1), taps=(0,), patch=4, window=0, out_channels=16, positions=False
    ),
}


def architecture(name: str) -> Architecture:
    """Return one of `SHAPES` as `icmoe.backbone` builds it."""
    shape = SHAPES[name]
    return Architecture(
        stride=shape.patch,
        channels=shape.out_channels,
        block_widths=(shape.width,) * len(shape.taps),
        build=lambda image_size: SamEncoder(shape, image_size).freeze(),
        own=fitted,
        inner=Inner(
            channels=shape.width,
            rest=lambda image_size: SamRest(shape, image_size),
            rest_of=lambda state: _rest_of(state, shape),
        ),
    )


def import_image_encoder() -> type[nn.Module]:
    """Return segment-anything's `ImageEncoderViT`.

    The package's own `__init__` needs torchvision although the encoder does not; where torchvision is absent, the
    package is entered without it.
    """
    try:
        from segment_anything.modeling import ImageEncoderViT
    except ImportError:
        for name in [name for name in sys.modules if name.split(".")[0] == "segment_anything"]:
            del sys.modules[name]
        found = importlib.util.find_spec("segment_anything")
        if found is None or found.submodule_search_locations is None:
            raise
        package = types.ModuleType("segment_anything")
        package.__path__ = list(found.submodule_search_locations)
        package.__spec__ = found
        sys.modules["segment_anything"] = package
        from segment_anything.modeling import ImageEncoderViT
    encoder: type[nn.Module] = ImageEncoderViT
    return encoder


class SamEncoder(nn.Module):
    """A frozen SAM encoder that also returns the outputs of some blocks.

    Parameters
    ----------
    shape
        Which encoder.
    image_size
        Side of the input, pixels, a multiple of the patch.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, shape: VitShape, image_size: int) -> None:
        super().__init__()
        self.shape = shape
        self.vit = _vit(shape, image_size)
        self.register_buffer("pixel_mean", torch.tensor(PIXEL_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(PIXEL_STD).view(3, 1, 1), persistent=False)

    def freeze(self) -> SamEncoder:
        """Return the encoder with faster attention, no gradients, in evaluation mode."""
        _with_faster_attention(self.vit, self.shape)
        return self.requires_grad_(requires_grad=False).eval()

    def forward(self, images_B3SS: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the embedding B C H W and the tapped blocks' outputs, each B width H W.

        Parameters
        ----------
        images_B3SS
            In [0, 1].
        """
        tokens_BCHW, tapped = self.front(images_B3SS)
        return _behind(self.vit, tokens_BCHW, self.shape.inner), tapped

    def front(self, images_B3SS: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the tokens that enter the last stage, B width H W, and the tapped blocks' outputs; parameters as `forward`."""
        x_BHWC = self.vit.patch_embed((images_B3SS - self.pixel_mean) / self.pixel_std)
        if self.vit.pos_embed is not None:
            x_BHWC = x_BHWC + self.vit.pos_embed
        tapped = []
        for index, block in enumerate(self.vit.blocks[: self.shape.inner]):
            x_BHWC = block(x_BHWC)
            if index in self.shape.taps:
                tapped.append(x_BHWC.permute(0, 3, 1, 2))
        return x_BHWC.permute(0, 3, 1, 2), tuple(tapped)


class SamRest(nn.Module):
    """The blocks after the last tap and the neck, frozen.

    Parameters
    ----------
    shape
        Which encoder.
    image_size
        Side of the input of the whole encoder, pixels.
    """

    def __init__(self, shape: VitShape, image_size: int) -> None:
        super().__init__()
        self.vit = _vit(shape, image_size, first=shape.inner)
        del self.vit.patch_embed
        _with_faster_attention(self.vit, shape)
        self.requires_grad_(requires_grad=False).eval()

    def forward(self, tokens_BCHW: Tensor) -> Tensor:
        """Return the embedding from the tokens that enter the last stage, B width H W."""
        return _behind(self.vit, tokens_BCHW, 0)


def _vit(shape: VitShape, image_size: int, *, first: int = 0) -> Any:  # noqa: ANN401  (segment-anything is untyped)
    """Return segment-anything's encoder from block `first` on."""
    return import_image_encoder()(
        img_size=image_size,
        patch_size=shape.patch,
        embed_dim=shape.width,
        depth=shape.depth - first,
        num_heads=shape.heads,
        out_chans=shape.out_channels,
        qkv_bias=True,
        use_abs_pos=shape.positions and first == 0,
        use_rel_pos=shape.positions,
        window_size=shape.window,
        global_attn_indexes=tuple(index - first for index in shape.global_blocks),
        norm_layer=lambda width: nn.LayerNorm(width, eps=1e-6),
    )


def _with_faster_attention(vit: Any, shape: VitShape) -> None:  # noqa: ANN401
    if shape.positions:
        for block in vit.blocks:
            block.attn, block.window_size = SamAttention(block.attn, block.window_size), 0


def _behind(vit: Any, tokens_BCHW: Tensor, first: int) -> Tensor:  # noqa: ANN401
    """Return what the blocks from `first` on and the neck make of tokens."""
    x_BHWC = tokens_BCHW.permute(0, 2, 3, 1)
    for block in vit.blocks[first:]:
        x_BHWC = block(x_BHWC)
    embedding_BCHW: Tensor = vit.neck(x_BHWC.permute(0, 3, 1, 2))
    return embedding_BCHW


def _rest_of(state: Mapping[str, Tensor], shape: VitShape) -> dict[str, Tensor]:
    """Return the state of `SamRest`, whose blocks are numbered anew, from that of the encoder."""
    found = {name: value for name, value in state.items() if name.startswith("vit.neck.")}
    for at in range(shape.inner, shape.depth):
        own = f"vit.blocks.{at}."
        found |= {f"vit.blocks.{at - shape.inner}.{name[len(own) :]}": state[name] for name in state if name.startswith(own)}
    return found


def fitted(weights: Mapping[str, Tensor], encoder: nn.Module) -> dict[str, Tensor]:
    """Return an encoder's weights, positions resampled to the encoder's input size.

    Parameters
    ----------
    weights
        A whole SAM ("image_encoder." in front) or the encoder alone.
    encoder
        The `SamEncoder` that is to take them.
    """
    prefix = "image_encoder."
    whole = any(name.startswith(prefix) for name in weights)
    own = {name.removeprefix(prefix): value for name, value in weights.items() if not whole or name.startswith(prefix)}
    own = {f"vit.{name}": value for name, value in own.items()}
    wanted = encoder.state_dict()
    return {name: _resampled(name, value, wanted[name].shape) if name in wanted else value for name, value in own.items()}


def _resampled(name: str, value: Tensor, shape: torch.Size) -> Tensor:
    if value.shape == shape:
        return value
    if name == "vit.pos_embed" and value.ndim == 4 and value.shape[3] == shape[3]:
        resized = F.interpolate(value.permute(0, 3, 1, 2), size=tuple(shape[1:3]), mode="bicubic", align_corners=False)
        return resized.permute(0, 2, 3, 1)
    if "rel_pos_" in name and value.ndim == 2 and value.shape[1] == shape[1]:
        return F.interpolate(value.T[None], size=shape[0], mode="linear")[0].T
    return value

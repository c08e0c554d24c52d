"""TinyViT as LiteMedSAM uses it: the image encoder behind `lite-medsam`.

TinyViT: Wu et al., arXiv 2207.10666; distilled from MedSAM (Ma et al., Nature Communications 2024) by its authors as
LiteMedSAM. Parameter names are those of the published weights, so that they load strictly. The token grid follows the
input: 256 px give 64 x 64, 128 px give 32 x 32 with the same weights.

Shapes: B images, C channels, H x W grid of the stage, L = H W tokens, S side of the image; h heads of d channels; w side of
an attention window, X = B R Q windows in R rows and Q columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from icmoe.backbones import Architecture, Inner

WIDTHS = (64, 128, 160, 320)
DEPTHS = (2, 2, 6, 2)
HEADS = (2, 4, 5, 10)
WINDOWS = (7, 7, 14, 7)
OUT_CHANNELS = 256
EXPANSION = 4
_LAST = str(len(WIDTHS) - 1)


class ConvNorm(nn.Sequential):
    """Convolution without bias, then batch norm; named "c" and "bn" in the weights."""

    def __init__(self, channels: int, out_channels: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.c = nn.Conv2d(channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)


class PatchEmbed(nn.Module):
    """Two pointwise layers at full resolution: LiteMedSAM keeps every pixel at the start."""

    def __init__(self) -> None:
        super().__init__()
        self.seq = nn.Sequential(ConvNorm(3, WIDTHS[0] // 2), nn.GELU(), ConvNorm(WIDTHS[0] // 2, WIDTHS[0]))

    def forward(self, images_B3SS: Tensor) -> Tensor:
        """Return B 64 S S."""
        x_BCSS: Tensor = self.seq(images_B3SS)
        return x_BCSS


class InvertedBottleneck(nn.Module):
    """MBConv: widen, depthwise 3x3, narrow, with a residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = channels * EXPANSION
        self.conv1 = ConvNorm(channels, hidden)
        self.conv2 = ConvNorm(hidden, hidden, 3, groups=hidden)
        self.conv3 = ConvNorm(hidden, channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return B C H W."""
        return F.gelu(x_BCHW + self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x_BCHW))))))


class Merge(nn.Module):
    """Between two stages: new width and, except into the last one, half the resolution."""

    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(channels, out_channels)
        self.conv2 = ConvNorm(out_channels, out_channels, 3, stride, groups=out_channels)
        self.conv3 = ConvNorm(out_channels, out_channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return B out_channels H/stride W/stride."""
        merged_BCHW: Tensor = self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x_BCHW)))))
        return merged_BCHW


class WindowAttention(nn.Module):
    """Multi-head attention inside a window, with one learned bias per head and absolute offset."""

    bias_index_LL: Tensor

    def __init__(self, channels: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.attention_biases = nn.Parameter(torch.zeros(heads, window * window))
        row_L, column_L = torch.arange(window * window) // window, torch.arange(window * window) % window
        offset_LL = (row_L[:, None] - row_L).abs() * window + (column_L[:, None] - column_L).abs()
        self.register_buffer("bias_index_LL", offset_LL, persistent=False)

    def forward(self, x_BLC: Tensor) -> Tensor:
        """Return B L C; the batch here counts windows."""
        # Per head, the channels of query, key and value lie side by side in the weights.
        q_BhLd, k_BhLd, v_BhLd = self.qkv(self.norm(x_BLC)).unflatten(2, (self.heads, 3, -1)).permute(3, 0, 2, 1, 4).unbind()
        bias_hLL = self.attention_biases[:, self.bias_index_LL]
        mixed_BhLd = F.scaled_dot_product_attention(q_BhLd, k_BhLd, v_BhLd, attn_mask=bias_hLL)
        attended_BLC: Tensor = self.proj(mixed_BhLd.transpose(1, 2).flatten(2))
        return attended_BLC


class Mlp(nn.Module):
    """Two-layer perceptron with its norm in front."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.fc1 = nn.Linear(channels, channels * EXPANSION)
        self.fc2 = nn.Linear(channels * EXPANSION, channels)

    def forward(self, x_BLC: Tensor) -> Tensor:
        """Return B L C."""
        y_BLC: Tensor = self.fc2(F.gelu(self.fc1(self.norm(x_BLC))))
        return y_BLC


class AttentionBlock(nn.Module):
    """Windowed attention, local depthwise convolution, perceptron."""

    def __init__(self, channels: int, heads: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.attn = WindowAttention(channels, heads, window)
        self.local_conv = ConvNorm(channels, channels, 3, groups=channels)
        self.mlp = Mlp(channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return B C H W."""
        x_BHWC = x_BCHW.permute(0, 2, 3, 1)
        x_BHWC = x_BHWC + self._attend(x_BHWC)
        x_BCHW = self.local_conv(x_BHWC.permute(0, 3, 1, 2))
        x_BLC = x_BCHW.flatten(2).transpose(1, 2)
        y_BLC: Tensor = x_BLC + self.mlp(x_BLC)
        return y_BLC.transpose(1, 2).view_as(x_BCHW)

    def _attend(self, x_BHWC: Tensor) -> Tensor:
        w, (B, H, W, C) = self.window, x_BHWC.shape
        if (w, w) == (H, W):
            return self.attn(x_BHWC.reshape(B, w * w, C)).view(B, H, W, C)  # type: ignore[no-any-return]
        padded_BHWC = F.pad(x_BHWC, (0, 0, 0, -W % w, 0, -H % w))
        rows, columns = padded_BHWC.shape[1] // w, padded_BHWC.shape[2] // w
        window_XLC = padded_BHWC.view(B, rows, w, columns, w, C).transpose(2, 3).reshape(-1, w * w, C)
        mixed_BRwQwC = self.attn(window_XLC).view(B, rows, columns, w, w, C).transpose(2, 3)
        return mixed_BRwQwC.reshape(B, rows * w, columns * w, C)[:, :H, :W]  # type: ignore[no-any-return]


class Stage(nn.Module):
    """Blocks of one width and, except in the last stage, the merge behind them."""

    def __init__(self, index: int) -> None:
        super().__init__()
        width = WIDTHS[index]
        self.blocks = nn.ModuleList(
            InvertedBottleneck(width) if index == 0 else AttentionBlock(width, HEADS[index], WINDOWS[index])
            for _ in range(DEPTHS[index])
        )
        last = index == len(WIDTHS) - 1
        self.downsample = None if last else Merge(width, WIDTHS[index + 1], stride=1 if index == 2 else 2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the stage's output, merged."""
        for block in self.blocks:
            x_BCHW = block(x_BCHW)
        return x_BCHW if self.downsample is None else self.downsample(x_BCHW)


class ChannelNorm(nn.Module):
    """Layer norm over the channels of each pixel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return B C H W."""
        return F.layer_norm(x_BCHW.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, 1e-6).permute(0, 3, 1, 2)


class Neck(nn.Sequential):
    """From the last stage's tokens to the embedding."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(WIDTHS[-1], OUT_CHANNELS, 1, bias=False),
            ChannelNorm(OUT_CHANNELS),
            nn.Conv2d(OUT_CHANNELS, OUT_CHANNELS, 3, padding=1, bias=False),
            ChannelNorm(OUT_CHANNELS),
        )


class Encoded(NamedTuple):
    """What stands last, B C S/4 S/4, and the outputs of the first two stages, B 128 S/2 S/2 and B 160 S/4 S/4."""

    last_BCHW: Tensor
    stages: tuple[Tensor, Tensor]


class Frozen(nn.Module):
    """Never trained and always in evaluation mode: a batch norm must never see a hospital."""

    def freeze(self) -> None:
        """Take the gradients from what is there so far."""
        self.requires_grad_(requires_grad=False)
        super().train(mode=False)

    def train(self, mode: bool = True) -> Self:  # noqa: FBT001, FBT002  (torch's own signature)
        """Stay in evaluation mode whatever is asked."""
        del mode
        return self


class TinyViT(Frozen):
    """LiteMedSAM's image encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed()
        self.layers = nn.ModuleList(Stage(index) for index in range(len(WIDTHS)))
        self.neck = Neck()
        self.freeze()

    def forward(self, images_B3SS: Tensor) -> Encoded:
        """Return the embedding, C = 256, and the first two stages' outputs.

        Parameters
        ----------
        images_B3SS
            In [0, 1]; S a multiple of 32.
        """
        tokens_BCHW, stages = self.front(images_B3SS)
        return Encoded(self.neck(self.layers[-1](tokens_BCHW)), stages)

    def front(self, images_B3SS: Tensor) -> Encoded:
        """Return the tokens that enter the last stage, C = 320, and the first two stages' outputs; parameters as `forward`."""
        x_BCHW = self.patch_embed(images_B3SS)
        outputs = []
        for stage in self.layers[:-1]:
            x_BCHW = stage(x_BCHW)
            outputs.append(x_BCHW)
        return Encoded(x_BCHW, (outputs[0], outputs[1]))


class Rest(Frozen):
    """The last stage and the neck, under the names that they have in the encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({_LAST: Stage(len(WIDTHS) - 1)})
        self.neck = Neck()
        self.freeze()

    def forward(self, tokens_BCHW: Tensor) -> Tensor:
        """Return the embedding, B 256 H W, from the tokens that enter the last stage, B 320 H W."""
        embedding_BCHW: Tensor = self.neck(self.layers[_LAST](tokens_BCHW))
        return embedding_BCHW


def architecture(name: str) -> Architecture:
    """Return LiteMedSAM's encoder as `icmoe.backbone` builds it; there is one of any `name`."""
    del name
    widths = (4 * WIDTHS[1], WIDTHS[2])
    inner = Inner(channels=WIDTHS[-1], rest=lambda _: Rest(), rest_of=_rest_of)
    return Architecture(stride=4, channels=OUT_CHANNELS, block_widths=widths, build=lambda _: TinyViT(), own=_own, inner=inner)


def _rest_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if name.startswith((f"layers.{_LAST}.", "neck."))}


def _own(weights: Mapping[str, Tensor], encoder: nn.Module) -> dict[str, Tensor]:
    del encoder  # its weights do not depend on the input size
    prefix = "image_encoder."
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}

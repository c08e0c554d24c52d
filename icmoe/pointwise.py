"""A 1x1 convolution as a matrix product."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Pointwise(nn.Module):
    """Mix the channels of each pixel; equal to a 1x1 `Conv2d`.

    On one CPU thread PyTorch sends small-batch 1x1 convolutions to its slow path; a plain matrix product makes a
    training step about twice as fast there and is the same product on a GPU. The batch stays in dimension 0.

    Parameters
    ----------
    channels
        Channels in.
    out_channels
        Channels out.
    """

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(channels)
        self.weight = nn.Parameter(torch.empty(out_channels, channels).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(out_channels).uniform_(-bound, bound))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return B out_channels H W."""
        return mix_channels(x_BCHW, self.weight, self.bias)


def mix_channels(x_BCHW: Tensor, weight_OC: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Return ``weight x + bias`` at every pixel, B O H W.

    The batched product is spelled out because `torch.matmul` folds the batch and pays for it with copies.
    """
    x_BCN = x_BCHW.flatten(2)
    weight_BOC = weight_OC.to(x_BCN.dtype).expand(x_BCN.shape[0], -1, -1)
    if bias_O is None:
        y_BON = torch.bmm(weight_BOC, x_BCN)
    else:
        y_BON = torch.baddbmm(bias_O.to(x_BCN.dtype)[:, None], weight_BOC, x_BCN)
    return y_BON.view(*y_BON.shape[:2], *x_BCHW.shape[2:])

"""From a grey image to the backbone's square input, from a mask to area fractions, and back to the source's pixels.

All three directions share one geometry: the source is scaled by exactly side / longest side and put into the upper
left corner of a square; what it does not cover is padding. H, W: source pixels; S: side of the square; K: classes.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, assert_never

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from icmoe.study import View

DARK_GAMMA = 1.5
BRIGHT_GAMMA = 0.67
MATRICES = 8
"""Kept of each kind: slices of a series need the same few. Radiographs have a size each, and one of theirs takes some 10 MB."""


def prepare(image_HW: npt.NDArray[np.float32], size: int) -> Tensor:
    """Return the backbone's input for one image.

    Parameters
    ----------
    image_HW
        Grey values in [0, 1], as `normalise` returns them.
    size
        Side S of the square, pixels.

    Returns
    -------
    Tensor
        3 S S float32 in [0, 1], three equal channels; padding below or to the right is 0.
    """
    shape = _shape(image_HW)
    rows, columns = (_resize(_covered(n, size, max(shape)), n, size / max(shape)) for n in shape)
    square_SS = torch.zeros(size, size)
    square_SS[: rows.shape[0], : columns.shape[0]] = (rows @ torch.from_numpy(image_HW) @ columns.T).clamp(0.0, 1.0)
    return square_SS.expand(3, size, size).contiguous()


def apply_view(images_3SS: Tensor, view: View) -> Tensor:
    """Return a fixed view of a prepared image.

    Parameters
    ----------
    images_3SS
        Values in [0, 1]; leading batch dimensions are allowed.
    view
        identity, flip (left-right), dark (gamma 1.5) or bright (gamma 0.67).

    Returns
    -------
    Tensor
        Same shape, values in [0, 1].
    """
    match view:
        case "identity":
            return images_3SS
        case "flip":
            return images_3SS.flip(-1)
        case "dark":
            return images_3SS.pow(DARK_GAMMA)
        case "bright":
            return images_3SS.pow(BRIGHT_GAMMA)
        case _:
            assert_never(view)


def target(classes_HW: npt.NDArray[np.uint8], K: int, side: int) -> Tensor:
    """Return what share of each cell's area each class covers on the letterboxed square.

    Parameters
    ----------
    classes_HW
        Class index of each source pixel, 0 to K - 1.
    K
        Number of classes, the background counted.
    side
        Cells along one side of the square.

    Returns
    -------
    Tensor
        K x side x side float32, at least 0, sum over K is 1; padding counts as class 0.

    Raises
    ------
    ValueError
        Where a class index is K or more.
    """
    shape = _shape(classes_HW)
    if int(classes_HW.max()) >= K:
        raise ValueError(f"class index {int(classes_HW.max())} with {K} classes")
    rows, columns = (_overlap(side, n, max(shape)) for n in shape)
    foreground_KHW = torch.stack([torch.from_numpy(classes_HW == k) for k in range(1, K)]).double() if K > 1 else None
    areas_Kss = torch.zeros(K, side, side, dtype=torch.float64)
    if foreground_KHW is not None:
        areas_Kss[1:] = rows @ foreground_KHW @ columns.T
    areas_Kss[0] = (1.0 - areas_Kss[1:].sum(0)).clamp_min(0.0)
    return areas_Kss.float()


def view_target(target_Kss: Tensor, view: View) -> Tensor:
    """Return the target that belongs to `apply_view` with the same view: only a flip moves pixels.

    Parameters
    ----------
    target_Kss
        Area fractions, leading batch dimensions are allowed.
    view
        As for `apply_view`.
    """
    return target_Kss.flip(-1) if view == "flip" else target_Kss


def restore(probabilities_KSS: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return probabilities on the source's pixel grid: the padding is cut off, the rest resized (bilinear).

    Parameters
    ----------
    probabilities_KSS
        Per class on the square, any side S.
    shape
        Height and width of the source image, pixels.

    Returns
    -------
    Tensor
        K x H x W in the dtype of the input; weights of the interpolation sum to 1, so sums over K are kept.
    """
    side, longest = probabilities_KSS.shape[-1], max(shape)
    covered = [_covered(n, side, longest) for n in shape]
    rows, columns = (_resize(n, cells, longest / side).to(probabilities_KSS) for n, cells in zip(shape, covered, strict=True))
    return rows @ probabilities_KSS[..., : covered[0], : covered[1]] @ columns.T


def _shape(image_HW: npt.NDArray[Any]) -> tuple[int, int]:
    if image_HW.ndim != 2 or image_HW.size == 0:
        raise ValueError(f"an image of shape H x W is needed, not {image_HW.shape}")
    return (image_HW.shape[0], image_HW.shape[1])


def _covered(pixels: int, side: int, longest: int) -> int:
    """Return how many of `side` cells have their centre on a source axis of `pixels` pixels, at least 1."""
    # Integers: the count of j with j + 1/2 < pixels * side / longest must not hang on rounding.
    return max(1, -((longest - 2 * pixels * side) // (2 * longest)))


@lru_cache(maxsize=MATRICES)
def _resize(out: int, cells: int, scale: float) -> Tensor:
    """Return the matrix (out x cells) of an anti-aliased bilinear resize by `scale` along one axis; rows sum to 1."""
    # A centre beyond the last cell's (the short side rarely ends on a cell's edge) takes that cell's value.
    centres = ((torch.arange(out, dtype=torch.float64) + 0.5) / scale).clamp(0.5, cells - 0.5)
    reach = max(1.0, 1.0 / scale)
    distances = (centres[:, None] - (torch.arange(cells, dtype=torch.float64) + 0.5)).abs()
    weights = (1.0 - distances / reach).clamp_min(0.0)
    return (weights / weights.sum(1, keepdim=True)).float()


@lru_cache(maxsize=MATRICES)
def _overlap(side: int, pixels: int, longest: int) -> Tensor:
    """Return the matrix (side x pixels, float64) of the share of each cell that each source pixel covers along one axis."""
    edges = torch.arange(pixels + 1, dtype=torch.float64) * (side / longest)
    cells = torch.arange(side, dtype=torch.float64)[:, None]
    return (torch.minimum(edges[1:], cells + 1.0) - torch.maximum(edges[:-1], cells)).clamp_min(0.0)

"""From a grey image to the backbone's square input, from a mask to area fractions, and back to the source's pixels.

All three directions share one geometry: the source is scaled by exactly side / longest side and put into the upper
left corner of a square; what it does not cover is padding. H, W: source pixels; S: side of the square; K: classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, assert_never

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from icmoe.study import View

PREPROCESSING_VERSION = 2
"""Part of every feature-cache key; raised whenever `normalise`, `prepare` or `apply_view` give other pixels."""

DARK_GAMMA = 1.5
BRIGHT_GAMMA = 0.67
PERCENTILES = (0.5, 99.5)


@dataclass(frozen=True, slots=True)
class Window:
    """Grey values that become 0 and 1.

    Parameters
    ----------
    low
        Grey value mapped to 0; finite.
    high
        Grey value mapped to 1; finite and above `low`.

    Raises
    ------
    ValueError
        Where `high` is not above `low` or one of them is not finite.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"a window needs finite low < high, not {self.low} and {self.high}")


def series_window(images: Sequence[npt.NDArray[Any]]) -> Window:
    """Return the window of one patient's slices: percentiles 0.5 and 99.5 of all their finite pixels.

    Where the percentiles coincide (a small object on an empty ground) the extremes are taken, and [v, v + 1] where
    every pixel is v.

    Parameters
    ----------
    images
        At least one array, H x W each, any real dtype; sizes may differ.

    Raises
    ------
    ValueError
        Where there is no finite pixel.
    """
    pixels = np.concatenate([np.asarray(image).ravel() for image in images]) if images else np.empty(0)
    if pixels.dtype.kind == "f":
        pixels = pixels[np.isfinite(pixels)]
    if pixels.size == 0:
        raise ValueError("a window needs at least one finite pixel")
    low, high = (float(value) for value in np.percentile(pixels, PERCENTILES))
    if low >= high:
        low, high = float(pixels.min()), float(pixels.max())
    return Window(low, high if high > low else low + 1.0)


def normalise(image_HW: npt.NDArray[Any], window: Window) -> npt.NDArray[np.float32]:
    """Return grey values on the scale of their series, the same whatever linear scale a file stored them in.

    Parameters
    ----------
    image_HW
        Grey image, any real dtype; pixels that are not finite count as `window.low`.
    window
        Grey values mapped to 0 and 1; what lies outside is clipped.

    Returns
    -------
    ndarray
        H x W float32 in [0, 1].
    """
    scaled_HW = (np.asarray(image_HW, dtype=np.float64) - window.low) / (window.high - window.low)
    return np.clip(np.nan_to_num(scaled_HW, nan=0.0, posinf=0.0, neginf=0.0), 0.0, 1.0).astype(np.float32)


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


@lru_cache(maxsize=256)
def _resize(out: int, cells: int, scale: float) -> Tensor:
    """Return the matrix (out x cells) of an anti-aliased bilinear resize by `scale` along one axis; rows sum to 1."""
    # A centre beyond the last cell's (the short side rarely ends on a cell's edge) takes that cell's value.
    centres = ((torch.arange(out, dtype=torch.float64) + 0.5) / scale).clamp(0.5, cells - 0.5)
    reach = max(1.0, 1.0 / scale)
    distances = (centres[:, None] - (torch.arange(cells, dtype=torch.float64) + 0.5)).abs()
    weights = (1.0 - distances / reach).clamp_min(0.0)
    return (weights / weights.sum(1, keepdim=True)).float()


@lru_cache(maxsize=256)
def _overlap(side: int, pixels: int, longest: int) -> Tensor:
    """Return the matrix (side x pixels, float64) of the share of each cell that each source pixel covers along one axis."""
    edges = torch.arange(pixels + 1, dtype=torch.float64) * (side / longest)
    cells = torch.arange(side, dtype=torch.float64)[:, None]
    return (torch.minimum(edges[1:], cells + 1.0) - torch.maximum(edges[:-1], cells)).clamp_min(0.0)

"""The pixels of a closed contour: those whose centres it encloses or runs through, and what several contours of a region make."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from icmoe.data.ingest.refusals import OFF_IMAGE, Refusal

ON_OUTLINE_PX = 1e-3
"""How far from an outline, along a row or a column, a pixel's centre lies on it."""
MAX_BOX_PX = 2**26
MAX_OUTLINE_PX = 2**22
TOO_LARGE = "contour is far larger than its image"


class Filled(NamedTuple):
    """What one contour marks on an image, H x W: the pixels whose centres lie within it, and those whose centres it runs through.

    Both belong to its region, also where it leaves a hole: systems that trace a mask draw through the centres of the mask's
    outermost pixels, around a hole as well.
    """

    inside: npt.NDArray[np.bool_]
    on_outline: npt.NDArray[np.bool_]

    @property
    def all(self) -> npt.NDArray[np.bool_]:
        """Both together."""
        return self.inside | self.on_outline


def fill(points_N2: npt.NDArray[np.float64], shape: tuple[int, int], within_px: float = ON_OUTLINE_PX) -> Filled:
    """Return the pixels whose centres a contour encloses or runs through, wherever it starts and whichever way it goes.

    Parameters
    ----------
    points_N2
        Rows and columns on the image, pixels.
    shape
        Height and width of the image, pixels.
    within_px
        How far from the contour, along a row or a column, a pixel's centre lies on it.

    Raises
    ------
    Refusal
        121 where the contour lies mostly outside the image.
    """
    low_2, inside = _enclosed(points_N2)
    on_outline = np.zeros_like(inside)
    on_outline[tuple((run_through(points_N2, within_px) - low_2).T)] = True
    inside &= ~on_outline
    filled = Filled(_cropped(inside, low_2, shape), _cropped(on_outline, low_2, shape))
    if 2 * np.count_nonzero(filled.all) < np.count_nonzero(inside) + np.count_nonzero(on_outline):
        raise Refusal(121, OFF_IMAGE)
    return filled


def marked_by(points_N2: npt.NDArray[np.float64], shape: tuple[int, int], within_px: float = ON_OUTLINE_PX) -> Filled | None:
    """Return what a closed contour marks, None where it encloses no more than a line does.

    One no larger than a pixel that encloses no centre marks the pixel that it lies on: small objects are looked for, and their
    image is not background. One of fewer than 3 points marks something only where it was traced from centre to centre.

    Shapes, distances and errors are those of `fill`.
    """
    filled, corners_N2 = fill(points_N2, shape, within_px), np.unique(points_N2, axis=0)
    if len(corners_N2) < 3:
        return filled if np.abs(corners_N2 - np.rint(corners_N2)).max() <= within_px else None
    if not filled.all.any() and np.ptp(corners_N2, axis=0).max() <= 1.0:
        middle_2 = (corners_N2.min(axis=0) + corners_N2.max(axis=0)) / 2
        filled.on_outline[on_image(np.rint(middle_2)[None].astype(np.int64), shape)] = True
    return filled if filled.all.any() else None


def joined(parts: Iterable[tuple[Filled, bool]]) -> npt.NDArray[np.bool_]:
    """Return what the contours of one region mark on an image: one within another leaves a hole (PS3.3 C.8.8.6.3).

    Contours that overlap in part are one area, except those of type `XOR`.

    Parameters
    ----------
    parts
        At least one: what a contour marks, and whether it is of type `XOR`.
    """
    (outermost, _), *further = sorted(parts, key=_largest_first)  # an outline before what lies in it
    region = outermost.all
    for filled, xor in further:
        within = not (filled.all & ~region).any()
        apart = not (filled.inside & region).any()
        region = ((region ^ filled.inside) if xor or within or apart else (region | filled.inside)) | filled.on_outline
    return region


def _largest_first(part: tuple[Filled, bool]) -> tuple[int, int]:
    return -int(np.count_nonzero(part[0].all)), -int(np.count_nonzero(part[0].inside))


def run_through(points_N2: npt.NDArray[np.float64], within_px: float = ON_OUTLINE_PX) -> npt.NDArray[np.int64]:
    """Return the pixels, rows and columns, whose centres lie on the closed line through some points, or so close to it.

    Each edge is followed along the axis on which it is longest, whole pixel by whole pixel: of those its centres are.

    Parameters
    ----------
    points_N2
        Rows and columns on the image, pixels.
    within_px
        How far along the other axis a centre may lie from the line, pixels.
    """
    way_N2 = np.roll(points_N2, -1, axis=0) - points_N2
    edges = np.arange(len(points_N2))
    axis = np.abs(way_N2).argmax(axis=1)
    start, way = points_N2[edges, axis], way_N2[edges, axis]
    first = np.ceil(np.minimum(start, start + way) - within_px)
    counts = np.maximum(np.floor(np.maximum(start, start + way) + within_px) - first + 1, 0).astype(np.int64)
    edge, step = _counted(counts)
    share = (first[edge] + step - start[edge]) / np.where(way == 0.0, 1.0, way)[edge]
    on_line_N2 = points_N2[edge] + np.clip(share, 0.0, 1.0)[:, None] * way_N2[edge]
    pixels_N2 = np.rint(on_line_N2).astype(np.int64)
    return np.asarray(pixels_N2[np.abs(on_line_N2 - pixels_N2).max(axis=1) <= within_px])


def on_image(pixels_N2: npt.NDArray[np.int64], shape: tuple[int, int]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the rows and the columns of those pixels, N x 2, that are on an image of this height and width."""
    rows, columns = pixels_N2[((pixels_N2 >= 0) & (pixels_N2 < shape)).all(axis=1)].T
    return rows, columns


def _enclosed(points_N2: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Return the first pixel of the box around a contour, and which of the box's pixels have their centres within.

    Those on the outline come out either way. Each row is gone along from edge to edge: of the pixels between every other pair.
    """
    low_2, high_2 = np.floor(points_N2.min(axis=0)).astype(np.int64), np.ceil(points_N2.max(axis=0)).astype(np.int64)
    height, width = high_2 - low_2 + 1
    if float(height) * float(width) > MAX_BOX_PX:
        raise Refusal(121, TOO_LARGE)
    end_N2 = np.roll(points_N2, -1, axis=0)
    way_N2 = end_N2 - points_N2
    ends = np.ceil(np.sort([points_N2[:, 0], end_N2[:, 0]], axis=0))  # exact, so that a row at a corner is of one edge alone
    edge, step = _counted((ends[1] - ends[0]).astype(np.int64))
    rows = ends[0][edge] + step
    columns = points_N2[edge, 1] + (rows - points_N2[edge, 0]) * (way_N2[edge, 1] / way_N2[edge, 0])
    crossed = np.zeros((height, width), dtype=bool)
    where = (rows - low_2[0]).astype(np.int64), np.clip(np.ceil(columns).astype(np.int64) - low_2[1], 0, width - 1)
    np.logical_xor.at(crossed, where, True)  # noqa: FBT003  # of a ufunc
    return low_2, np.logical_xor.accumulate(crossed, axis=1)


def _counted(counts: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return for so many steps along each edge its number and that of the step."""
    if counts.sum() > MAX_OUTLINE_PX:
        raise Refusal(121, TOO_LARGE)
    edge = np.repeat(np.arange(len(counts)), counts)
    return edge, np.arange(len(edge)) - np.repeat(np.cumsum(counts) - counts, counts)


def _cropped(box: npt.NDArray[np.bool_], low_2: npt.NDArray[np.int64], shape: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """Return a box of pixels that begins at `low_2` on the image."""
    mask = np.zeros(shape, dtype=bool)
    first, last = np.maximum(low_2, 0), np.maximum(np.minimum(low_2 + box.shape, shape), 0)
    own = box[tuple(slice(*ends) for ends in zip(first - low_2, last - low_2, strict=True))] if (first < last).all() else False
    mask[first[0] : last[0], first[1] : last[1]] = own
    return mask

"""Where pixels lie in the patient: planes, which pixel of a mask belongs to which of an image, upright orientation.

All coordinates are DICOM's (mm; x to the left, y to the back, z to the head). Grids are matched exactly or not at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from icmoe.data.ingest.records import FileRecord, Plane

ALIGNED = 0.9
"""Least cosine between a pixel axis and a body axis for a picture to be turned upright; oblique ones stay as stored."""
OFF_GRID_PX = 0.1
"""Largest distance of a mask's pixel centre from the image's, in pixels, over the whole image."""
OFF_PLANE_MM = 0.5
"""How far a mark may lie from the plane of the image that it is on."""
OFF_STEP = 0.05
"""How far the distance of two slices may be from whole steps of their series, in steps."""
ROUNDED = 1e-3
"""How far directions and distances of pixels, as a share, may differ that are the same."""
SIDE_ROUNDED = 5e-3
"""As much of the distance of pixels in what was copied from an image: some systems write two decimals."""
PARTS = slice(0, 3), slice(3, 9), slice(9, 11)
"""Of a plane: position, directions, distances."""

Array = npt.NDArray[np.float64]


def plane_matrix(plane: Plane) -> Array:
    """Return the 4 x 4 matrix from (row, column, mm along the normal, 1) to coordinates; distances of 0 count as 1 mm."""
    values = np.asarray(plane)
    along_row, along_column = values[3:6], values[6:9]
    matrix = np.eye(4)
    matrix[:3, 0] = along_column * (values[9] or 1.0)
    matrix[:3, 1] = along_row * (values[10] or 1.0)
    matrix[:3, 2] = normal(plane)
    matrix[:3, 3] = values[:3]
    return matrix


def matrix_of(record: FileRecord) -> Array:
    """Return the 4 x 4 matrix of a volume from its record, from voxel index to coordinates."""
    return np.vstack([np.asarray(record.affine).reshape(3, 4), [0.0, 0.0, 0.0, 1.0]])


def normal(plane: Plane) -> tuple[float, float, float]:
    """Return the direction across a plane: along a row times along a column; plain numbers, as it is asked for very often."""
    (a, b, c), (x, y, z) = plane[3:6], plane[6:9]
    return (b * z - c * y, c * x - a * z, a * y - b * x)


def height_mm(plane: Plane) -> float:
    """Return the plane's position along its own normal."""
    return sum(one * other for one, other in zip(normal(plane), plane[:3], strict=True))


def parallel(one: Plane, other: Plane) -> bool:
    """Return whether two planes have the same normal within 1 degree, whichever way it points."""
    return abs(sum(a * b for a, b in zip(normal(one), normal(other), strict=True))) > 0.99985


def is_rounded(copy: Plane, image: Plane) -> bool:
    """Return whether a plane is an image's written with fewer decimals, which over many pixels may add up to one."""
    starts_mm, axes, sides = (np.abs(np.subtract(copy[part], image[part])).max() for part in PARTS)
    shortest_mm = min(image[9:])
    return bool(starts_mm <= OFF_GRID_PX * shortest_mm and axes <= ROUNDED and sides <= SIDE_ROUNDED * shortest_mm)


@dataclass(frozen=True, slots=True)
class Grid:
    """Which voxel of a mask lies under a pixel: `steps_33` times (row, column, 1), whole numbers."""

    steps_33: npt.NDArray[np.int64]

    def take(self, mask: npt.NDArray[Any], shape: tuple[int, int]) -> npt.NDArray[Any]:
        """Return the mask on the image's pixels, 0 where it does not reach.

        Parameters
        ----------
        mask
            Three axes.
        shape
            Height and width of the image, pixels.
        """
        places = [self._places(axis, shape) for axis in range(3)]
        if all(place.min() >= 0 and place.max() < extent for place, extent in zip(places, mask.shape, strict=True)):
            return np.array(np.broadcast_to(mask[tuple(places)], shape))
        inside = np.ones(shape, dtype=bool)
        for place, extent in zip(places, mask.shape, strict=True):
            inside = inside & (place >= 0) & (place < extent)
        where = tuple(np.clip(place, 0, extent - 1) for place, extent in zip(places, mask.shape, strict=True))
        return np.where(inside, mask[where], mask.dtype.type(0))

    def _places(self, axis: int, shape: tuple[int, int]) -> npt.NDArray[np.int64]:
        """Return the mask's index along one axis for every pixel, with length 1 where it does not depend on a direction."""
        by_row, by_column, start = self.steps_33[axis]
        rows, columns = (np.arange(extent if step else 1) for extent, step in zip(shape, (by_row, by_column), strict=True))
        return np.asarray(by_row * rows[:, None] + by_column * columns[None, :] + start)


def share_within(mask: npt.NDArray[Any], grids: Sequence[Grid], shape: tuple[int, int]) -> float:
    """Return which share of a mask's marked voxels lies in the box around images, 1 where nothing is marked.

    Parameters
    ----------
    mask
        Three axes; other than 0 is marked.
    grids
        Of the images on the mask.
    shape
        Height and width of each image, pixels.
    """
    corners = [[row, column, 1] for row in (0, shape[0] - 1) for column in (0, shape[1] - 1)]
    reached = np.concatenate([np.asarray(corners) @ grid.steps_33.T for grid in grids])
    low, high = np.maximum(reached.min(axis=0), 0), reached.max(axis=0) + 1
    within = mask[tuple(slice(start, max(start, end)) for start, end in zip(low, high, strict=True))]
    marked = int(np.count_nonzero(mask))
    return float(np.count_nonzero(within)) / marked if marked else 1.0


def grid_between(mask_matrix: Array, image: Plane, shape: tuple[int, int], *, off_mm: float = 0.0) -> Grid | None:
    """Return which voxel of a mask lies under each pixel of an image, None where the grids do not meet.

    Parameters
    ----------
    mask_matrix
        4 x 4, from voxel index to coordinates.
    image
        Plane of the image.
    shape
        Its height and width, pixels.
    off_mm
        For a mask of one plane, whose third axis is in mm: how far it may lie above or below the image.
    """
    try:
        steps = (np.linalg.inv(mask_matrix) @ plane_matrix(image))[:3][:, [0, 1, 3]]
    except np.linalg.LinAlgError:
        return None
    whole = np.rint(steps)
    corners = np.asarray([[r, c, 1.0] for r in (0, shape[0] - 1) for c in (0, shape[1] - 1)]).T
    apart = np.abs((steps - whole) @ corners).max(axis=1)
    if off_mm:
        if np.abs(steps[2] @ corners).max() > off_mm:
            return None
        whole[2], apart[2] = 0.0, 0.0
    return Grid(whole.astype(np.int64)) if float(apart.max()) <= OFF_GRID_PX else None


@dataclass(frozen=True, slots=True)
class Upright:
    """How a picture is turned so that the body stands the same way in every series; flips come after the transposition."""

    transpose: bool = False
    flip_rows: bool = False
    flip_columns: bool = False

    def turn(self, image_HW: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return the picture turned."""
        turned = image_HW.T if self.transpose else image_HW
        turned = turned[::-1] if self.flip_rows else turned
        return np.ascontiguousarray(turned[:, ::-1] if self.flip_columns else turned)

    def turned_back(self, upright_HW: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return a picture on the pixels that were turned: the inverse of `turn`."""
        turned = upright_HW[:, ::-1] if self.flip_columns else upright_HW
        turned = turned[::-1] if self.flip_rows else turned
        return np.ascontiguousarray(turned.T if self.transpose else turned)


def upright(plane: Plane | None) -> Upright:
    """Return the turn to the usual view: axial with the left of the body on the right, coronal and sagittal head up.

    Oblique planes and unknown ones stay as they are stored.
    """
    return Upright() if plane is None else _turn(plane[3:6], plane[6:9])


@lru_cache(maxsize=64)  # slices of a series have the same
def _turn(row_axis: tuple[float, ...], column_axis: tuple[float, ...]) -> Upright:
    along_row, along_column = np.asarray(row_axis), np.asarray(column_axis)
    axes = [int(np.abs(axis).argmax()) for axis in (along_row, along_column)]
    if min(abs(along_row[axes[0]]), abs(along_column[axes[1]])) < ALIGNED or axes[0] == axes[1]:
        return Upright()
    across, down = {0: ((1, 1.0), (2, -1.0)), 1: ((0, 1.0), (2, -1.0)), 2: ((0, 1.0), (1, 1.0))}[3 - sum(axes)]
    transpose = axes[0] != across[0]
    row, column = (along_column, along_row) if transpose else (along_row, along_column)
    return Upright(transpose, bool(column[down[0]] * down[1] < 0.0), bool(row[across[0]] * across[1] < 0.0))


def slice_distance_mm(planes: Sequence[Plane | None]) -> float | None:
    """Return the distance of neighbouring slices where all are parallel and evenly spaced within 1 %, else None."""
    if len(planes) < 2 or any(plane is None for plane in planes):
        return None
    known = cast("Sequence[Plane]", planes)
    if not all(parallel(known[0], plane) for plane in known):
        return None
    gaps = _gaps_mm(known)
    return float(gaps.mean()) if gaps.min() > 1e-3 and np.ptp(gaps) <= 0.01 * gaps.mean() else None


def _gaps_mm(planes: Sequence[Plane]) -> Array:
    """Return the distances of neighbours along the normal of the first plane."""
    return np.diff(sorted(height_mm((*plane[:3], *planes[0][3:11])) for plane in planes))


def missing_slices(planes: Sequence[Plane | None]) -> int:
    """Return how many slices a stack lacks inside: where steps are even but for wide ones of whole steps, each by itself.

    Wide steps side by side are how a series was planned, such as a head that was scanned finer at its base.
    """
    if len(planes) < 4 or any(plane is None for plane in planes):
        return 0
    gaps = _gaps_mm(cast("Sequence[Plane]", planes))
    if gaps.min() <= 1e-3:
        return 0
    steps = gaps / np.median(gaps)
    whole = np.rint(steps)
    wide = whole > 1
    if np.abs(steps - whole).max() > OFF_STEP or whole.min() < 1 or (wide[1:] & wide[:-1]).any():
        return 0
    return int(whole.sum()) - len(whole)


def is_one_grid(planes: Sequence[Plane | None]) -> bool:
    """Return whether the pixels of parallel slices lie over each other, or beside by an even step as in a tilted gantry.

    They do not where a series was reconstructed twice, with another field of view or turned.
    """
    known = np.asarray([plane for plane in planes if plane is not None])
    axes_23, sides_2 = known[0, 3:9].reshape(2, 3), known[0, 10:8:-1]
    same = (np.abs(known[:, 3:9] - known[0, 3:9]).max() <= ROUNDED) & (np.abs(known[:, 9:] / known[0, 9:] - 1.0).max() <= ROUNDED)
    heights_N = known[:, :3] @ np.asarray(normal(cast(Plane, tuple(known[0]))))
    beside_N2 = (known[:, :3] @ axes_23.T / sides_2)[np.argsort(heights_N)]
    return bool(same and (len(known) < 3 or np.ptp(np.diff(beside_N2, axis=0), axis=0).max() <= OFF_GRID_PX))

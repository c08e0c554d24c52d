"""Whether the parts of a mask lie in the plane of an image, and on which of its pixels."""

from __future__ import annotations

from collections.abc import Sequence

from icmoe.data.ingest.forms import MASKS
from icmoe.data.ingest.geometry import (
    ALIGNED,
    OFF_PLANE_MM,
    ROUNDED,
    Grid,
    grid_between,
    height_mm,
    is_rounded,
    normal,
    parallel,
    plane_matrix,
)
from icmoe.data.ingest.records import FileRecord, Patch, Plane
from icmoe.data.ingest.refusals import Refusal


def patch_grid(record: FileRecord, patch: Patch, image: FileRecord, frame: int) -> Grid | None:
    """Return where the pixels of a part lie on the image, None for pixel by pixel or where it has none.

    Raises
    ------
    Refusal
        105 or 121 where they do not lie on its pixels.
    """
    plane, shape = image.frames[frame].plane, (image.rows, image.columns)
    if MASKS[record.kind].on_planes:
        if plane is None or not plane[9]:
            raise Refusal(121, "the image of a contour has no known geometry")
        return None
    if patch.plane is None or plane is None or not (patch.plane[9] or plane[9]):
        if (record.rows, record.columns) != shape:
            raise Refusal(105, f"mask {record.rows} x {record.columns}, image {shape[0]} x {shape[1]}")
        if plane is not None and not _lies_alike(patch, plane):
            raise Refusal(121, "mask is turned or shifted against its image, and does not say where its pixels lie")
        return None
    own, plane = _measured(patch.plane, plane), _measured(plane, patch.plane)
    if patch.image and (record.rows, record.columns) == shape and is_rounded(own, plane):
        return None
    grid = grid_between(plane_matrix(own), plane, shape, off_mm=OFF_PLANE_MM)
    if grid is None:
        raise Refusal(121, "mask lies in another plane, or between the image's pixels")
    if not overlaps(grid, (record.rows, record.columns, 1), shape):
        raise Refusal(121, "mask lies off its image")
    same = (record.rows, record.columns) == shape and grid.steps_33.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 0]]
    return None if same else grid


def _lies_alike(patch: Patch, image: Plane) -> bool:
    """Return whether a part that does not say where its pixels lie says nothing against their being its image's."""
    if patch.plane is not None:
        return is_rounded(_at_1_mm(patch.plane), _at_1_mm(image))
    return not patch.axes or max(abs(own - other) for own, other in zip(patch.axes, image[3:9], strict=True)) <= ROUNDED


def _measured(plane: Plane, other: Plane) -> Plane:
    """Return a plane with the other's distances of pixels where it has none, each along its own direction."""
    if plane[9]:
        return plane
    turned = abs(_along(plane[3:6], other[6:9])) > abs(_along(plane[3:6], other[3:6]))
    rows_mm, columns_mm = (other[10], other[9]) if turned else (other[9], other[10])
    return (*plane[:9], rows_mm, columns_mm)


def _at_1_mm(plane: Plane) -> Plane:
    return (*plane[:9], 1.0, 1.0)


def _along(one: Sequence[float], other: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


def same_plane(record: FileRecord, patch: Plane, image: Plane) -> bool:
    """Return whether a part of a mask lies in the plane of an image."""
    near = abs(height_mm((*patch[:3], *image[3:11])) - height_mm(image)) <= OFF_PLANE_MM
    return near and (MASKS[record.kind].on_planes or parallel(patch, image))  # of a contour only a point is known


def is_across(record: FileRecord, patch: Patch, image: Plane) -> bool:
    """Return whether a contour was drawn in another direction than an image's, as on a view that was computed from its series."""
    return bool(patch.axes) and MASKS[record.kind].on_planes and abs(_along(patch.axes, normal(image))) < ALIGNED


def overlaps(grid: Grid, mask: tuple[int, ...], image: tuple[int, int]) -> bool:
    """Return whether the box of a mask reaches any pixel of an image."""
    corners = [grid.steps_33 @ (row, column, 1) for row in (0, image[0] - 1) for column in (0, image[1] - 1)]
    return all(min(c[axis] for c in corners) < mask[axis] and max(c[axis] for c in corners) >= 0 for axis in range(3))


def require_its_box(mask: tuple[int, int, int], grid: Grid, image: tuple[int, int, int], slices: int) -> None:
    """Refuse a volume of which a program changed the axes, or the matrix that places them: its marks lie elsewhere on the image.

    Parameters
    ----------
    mask
        Its shape.
    grid
        Where it lies on a slice of the image.
    image
        Rows, columns and slices.
    slices
        How many of these lie on slices of the mask.

    Raises
    ------
    Refusal
        105 where it has the image's extents in another order, 121 where it has the same and does not cover the image.
    """
    steps_32 = grid.steps_33[:, :2]
    rows, columns, across = (*(int(abs(steps_32[:, way]).argmax()) for way in range(2)), int(steps_32.any(axis=1).argmin()))
    if len({rows, columns, across}) < 3:
        return
    extents = mask[rows], mask[columns], mask[across]
    if extents != image and sorted(extents) == sorted(image):
        raise Refusal(105, "it has the rows, columns and slices of its image in another order: its axes were exchanged")
    corners_23 = [grid.steps_33 @ (row, column, 1) for row, column in ((0, 0), (image[0] - 1, image[1] - 1))]
    covers = all(0 <= corner[axis] < mask[axis] for corner in corners_23 for axis in (rows, columns))
    if extents == image and not (covers and slices == image[2]):
        raise Refusal(121, "it has the rows, columns and slices of its image and lies beside it: its place or axes were changed")

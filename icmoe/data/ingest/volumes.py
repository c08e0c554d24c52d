"""Volumes of any form, cut into slices along the thick or axial direction."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from icmoe.data.ingest.forms import VOLUMES, module_of
from icmoe.data.ingest.opening import content_of
from icmoe.data.ingest.records import FileRecord, FramePlace, Patch, Plane
from icmoe.data.ingest.refusals import Refusal

MASK_VALUES = 32
"""Most distinct whole values that a mask has; an image has more."""
PARCELS = 4096
"""Most values of a parcellation of a whole body or brain: FreeSurfer's and TotalSegmentator's have some hundred."""
ALIKE, BY_ONE = 0.4, 0.5
"""Least share of neighbours in a parcellation that are equal (images: below 0.1), and most of the others that differ by one."""
PAIRS = 2**20
"""About as many neighbours are compared along an axis."""
NO_CLASSES = "it lies or is called as marks do, and its values are no classes"
SCALING_ERROR = 1e-3
"""How far from a whole number a class may lie that a file stores with a scale, such as 255 times 1/255 in float32."""


def read_volume(path: Path) -> tuple[npt.NDArray[Any], npt.NDArray[np.float64]]:
    """Return the voxels of a file of any of `VOLUMES`, three axes, and the matrix from voxel index to DICOM's axes, mm.

    Raises
    ------
    Refusal
        116 where it is a link or damaged before its form is known, 117 where it cannot be read, 119 where it holds no
        single volume.
    """
    form = VOLUMES.get(content_of(path))
    if form is None:
        raise Refusal(117, "file is no volume any more")
    found: tuple[npt.NDArray[Any], npt.NDArray[np.float64]] = module_of(form).read(path)
    return found


def volume_record(
    path: Path,
    called: int | None = None,
    named: Mapping[int, int] = MappingProxyType({}),
    *,
    is_scan: bool = False,
    among_masks: bool = False,
) -> FileRecord:
    """Return the record of a volume, whether it looks like a mask or an image.

    Parameters
    ----------
    path
        The file.
    called
        Class that it has the name of. Where it marks one thing alone, as 1 or 255, it marks that: programs write a file for
        each class, and 1 in all of them.
    named
        Values that mean a class, and which.
    is_scan
        Whether its path says that it is an image: wholly black, it is no mask without a mark.
    among_masks
        Whether its path says that it is a mask: shares from 0 to 1 are no grey values.

    Raises
    ------
    Refusal
        106 for shares among masks; 116, 117 or 119.
    """
    voxels, matrix = read_volume(path)
    axis = through_axis(matrix, voxels.shape)
    rows, columns = (extent for index, extent in enumerate(voxels.shape) if index != axis)
    few = looks_like_classes(voxels)
    black = few and is_scan and called is None and len(_distinct(voxels)) == 1
    mask = not black and (few or looks_like_parcels(voxels))
    if among_masks and not mask and 0.0 <= float(voxels.min()) <= float(voxels.max()) <= 1.0:
        raise Refusal(106, NO_CLASSES)
    values = _distinct(voxels) if mask else np.empty(0)
    single = mask and few and {*np.rint(values).tolist()} in ({0}, {0, 1}, {0, 255})
    frames = tuple(
        FramePlace(plane=slice_plane(matrix, axis, number), order=(float(number),)) for number in range(voxels.shape[axis])
    )
    return FileRecord(
        kind="volume",
        mask=mask,
        unnamed=_unnamed(values, named) if mask and not (called and single) else "",
        rows=rows,
        columns=columns,
        frames=frames,
        shape=cast("tuple[int, int, int]", voxels.shape),
        affine=tuple(float(value) for value in matrix[:3].ravel()),
        called=bool(called),
        single=single,
        patches=(Patch(number=0, label=called),) if called and (single or _means_another(values, called, named)) else (),
    )


def _means_another(values: npt.NDArray[Any], called: int, named: Mapping[int, int]) -> bool:
    """Return whether a mask marks one thing alone, by a value that means another class than it is called like."""
    marks = [float(value) for value in np.rint(values) if value != 0.0]
    return len(marks) == 1 and named.get(marks[0], called) != called  # type: ignore[call-overload]  # equal numbers are one key


def _unnamed(values: npt.NDArray[Any], named: Mapping[int, int]) -> str:
    """Return the first of the values that mean no class, empty where all do."""
    whole = np.rint(values)
    known = np.isin(whole, list(named)) & (np.abs(whole - values) < SCALING_ERROR)
    return ", ".join(f"{value:g}" for value in values[~known][:5])


def through_axis(matrix: npt.NDArray[np.float64], shape: tuple[int, ...]) -> int:
    """Return the axis that slices are cut across: the one with voxels half again as long, else the one nearest the head's.

    A single slice is not cut into lines.
    """
    single = [axis for axis, extent in enumerate(shape) if extent == 1]
    if len(single) == 1:
        return single[0]
    lengths = np.linalg.norm(matrix[:3, :3], axis=0)
    longest = int(lengths.argmax())
    if lengths[longest] > 1.5 * float(np.median(lengths)):
        return longest
    return int((np.abs(matrix[2, :3]) / lengths).argmax())


def slice_plane(matrix: npt.NDArray[np.float64], axis: int, number: int) -> Plane:
    """Return the plane of a slice whose rows and columns are the other two axes in their order."""
    down, across = (index for index in range(3) if index != axis)
    position = matrix[:3, 3] + matrix[:3, axis] * number
    lengths = np.linalg.norm(matrix[:3, :3], axis=0)
    values = (*position, *(matrix[:3, across] / lengths[across]), *(matrix[:3, down] / lengths[down]))
    return cast(Plane, tuple(float(value) for value in (*values, lengths[down], lengths[across])))


def looks_like_classes(values: npt.NDArray[Any]) -> bool:
    """Return whether an array holds few whole numbers, as masks do.

    One below zero or none at all (NaN) is no class, and makes a mask of no use, but no image of it.
    """
    if values.size == 0 or not float(np.fmax.reduce(values, axis=None)) <= 65535.0:
        return False
    few = _distinct(values.ravel()[:: max(1, values.size // 65536)])
    if len(few) > MASK_VALUES:
        return False
    found = _distinct(values)
    known = found[np.isfinite(found)]
    return len(found) <= MASK_VALUES and bool((np.abs(np.rint(known) - known) < SCALING_ERROR).all())


def looks_like_parcels(voxels: npt.NDArray[Any]) -> bool:
    """Return whether a volume of more values than `MASK_VALUES` marks them in patches along every axis, as no scan does.

    Values of a slow ramp are equal to their neighbours too, but change by one.
    """
    if min(voxels.shape) < 2 or not (float(voxels.min()) >= 0.0 and float(voxels.max()) <= 65535.0):
        return False
    steps = by_one = 0
    for along in (np.moveaxis(voxels, axis, 0) for axis in range(3)):
        every = max(1, voxels.size // PAIRS)  # some planes tell an image, and soon
        here, there = along[:-1:every], along[1::every]
        change = np.abs(here.astype(np.float64) - there)[(here > 0) | (there > 0)]
        if np.count_nonzero(change) > (1.0 - ALIKE) * change.size:
            return False
        steps, by_one = steps + int(np.count_nonzero(change)), by_one + int(np.count_nonzero(np.rint(change) == 1.0))
    found = _distinct(voxels)
    return by_one <= BY_ONE * steps and len(found) <= PARCELS and bool((np.abs(np.rint(found) - found) < SCALING_ERROR).all())


def _distinct(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the values up to 65535 that occur, in order; whole numbers from 0 are counted, many times as fast as sorted."""
    if values.dtype.kind in "iu" and int(values.min()) >= 0:
        return np.flatnonzero(np.bincount(values.ravel().astype(np.int64)))
    return np.unique(values)

"""A stack's classes as a NIfTI volume on the source's grid."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any, cast

import nibabel
import numpy as np
import numpy.typing as npt

from icmoe.data.ingest.geometry import matrix_of, normal
from icmoe.data.ingest.nifti import RAS_TO_LPS, is_placed
from icmoe.data.ingest.records import Plane
from icmoe.data.ingest.volumes import through_axis
from icmoe.errors import Fault, IcmoeError
from icmoe.predict.stacks import Series, Stack

UNEVEN = 0.01
"""Largest distance of a slice from its place on the line from the first to the last, in slice distances."""
SCANNER, UNKNOWN = 1, 0
"""NIfTI's codes for the scanner's own coordinates and for a matrix that says nothing."""
SAME_PLACE = 1e-4
"""How far the elements of two matrices may differ, mm, that place voxels alike."""


def nifti_bytes(root: Path, series: Series, stack: Stack, values_DHW: npt.NDArray[Any]) -> bytes:
    """Return a compressed NIfTI volume; equal arrays give equal bytes.

    Parameters
    ----------
    root, series, stack
        The source.
    values_DHW
        Whole numbers in the order of the stack's frames.

    Raises
    ------
    IcmoeError
        143 as `affine_of`.
    """
    affine = affine_of(series, stack)
    if series.first.kind == "volume":
        volume = np.empty_like(values_DHW)
        volume[[frame.number for frame in stack.frames]] = values_DHW
        volume = np.moveaxis(volume, 0, through_axis(matrix_of(series.first), series.first.shape))
    else:
        volume = values_DHW.transpose(2, 1, 0)
    image = nibabel.Nifti1Image(np.ascontiguousarray(volume), affine)
    image.set_sform(affine, SCANNER)
    image.set_qform(affine, SCANNER)
    if series.first.kind == "volume" and not is_placed(root / stack.frames[0].path):
        image.set_sform(None, UNKNOWN)  # as the source: a reader that takes it to lie elsewhere takes both to lie there
        image.set_qform(None, UNKNOWN)
    elif not np.allclose(image.get_qform(), affine, atol=SAME_PLACE):  # a quaternion cannot slant: two places for each voxel
        image.set_qform(None, UNKNOWN)
    image.header.set_xyzt_units("mm")
    return gzip.compress(image.to_bytes(), mtime=0)


def affine_of(series: Series, stack: Stack) -> npt.NDArray[np.float64]:
    """Return the 4 x 4 matrix from voxel index to NIfTI's axes (right, front, head), mm.

    A volume keeps its own. A DICOM stack is indexed by column, row, slice; slices that lie on a slanted line (a tilted
    gantry) make a slanted matrix. A single slice counts as 1 mm thick.

    Raises
    ------
    IcmoeError
        143 where the frames' places are unknown or not evenly spaced, or are not all of a volume's.
    """
    if series.first.kind == "volume":
        extent = len(series.first.frames)
        if len(stack.frames) != extent:
            raise _refused(stack, "a volume comes back whole", f"{len(stack.frames)} slices", f"its {extent}")
        return np.asarray(RAS_TO_LPS @ matrix_of(series.first))
    planes = stack.planes
    first = planes[0]
    if first is None or not first[9] or None in planes:
        raise _refused(stack, "a NIfTI volume needs to know where the frames lie and how large a pixel is")
    places_D3 = np.asarray([cast(Plane, plane)[:3] for plane in planes])
    step_3 = (places_D3[-1] - places_D3[0]) / max(1, len(planes) - 1)
    off_D = np.linalg.norm(places_D3 - (places_D3[0] + np.arange(len(planes))[:, None] * step_3), axis=1)
    if len(planes) > 1 and float(off_D.max()) > UNEVEN * float(np.linalg.norm(step_3)):
        raise _refused(stack, "a NIfTI volume needs evenly spaced slices")
    matrix = np.eye(4)
    matrix[:3, 0], matrix[:3, 1] = np.asarray(first[3:6]) * first[10], np.asarray(first[6:9]) * first[9]
    matrix[:3, 2] = step_3 if len(planes) > 1 else normal(first)
    matrix[:3, 3] = places_D3[0]
    return np.asarray(RAS_TO_LPS @ matrix)


def _refused(stack: Stack, what: str, value: str = "", limit: str = "") -> IcmoeError:
    return IcmoeError(Fault(number=143, where=stack.frames[0].path, what=what, value=value, limit=limit))

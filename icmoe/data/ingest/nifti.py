"""NIfTI volumes, read by nibabel, their axes in DICOM's convention."""

from __future__ import annotations

import gzip
import itertools
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from icmoe.data.ingest.refusals import Refusal, refusing

MAX_VOXELS = 2**28
RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
MM = {1: 1e3, 2: 1.0, 3: 1e-3}
"""Millimetres by the code of a unit of length: metre, millimetre, micrometre; without one they are millimetres."""
MAX_BEHIND_BYTES = 2**26
"""Bytes of content behind the voxels that are read for the checksum."""
MAX_APART_VOXELS = 0.1
"""How far the two places that a header may give for a voxel may lie apart."""


def is_one(head: bytes) -> bool:
    """Return whether a file begins as NIfTI-1 or NIfTI-2 does, in either byte order."""
    return head[:4] in {b"\x5c\x01\0\0", b"\0\0\x01\x5c", b"\x1c\x02\0\0", b"\0\0\x02\x1c"} and (
        head[344:348] in {b"n+1\0", b"ni1\0"} or head[4:8] in {b"n+2\0", b"ni2\0"}
    )


def read(path: Path) -> tuple[npt.NDArray[Any], npt.NDArray[np.float64]]:
    """Return the voxels, three axes, and the 4 x 4 matrix from voxel index to DICOM's axes, mm; a file of two axes is one slice.

    Raises
    ------
    Refusal
        116 where the voxels lie in another file, 117 where it cannot be read or gives two places for them, 119 where it is no
        volume of at most `MAX_VOXELS` voxels.
    """
    # nibabel chooses a reader by the name's ending; the content has been looked at, and the name has no say.
    with refusing(117, "NIfTI volume is damaged"), path.open("rb") as raw:
        stream = _stream(raw)
        image = _image(stream)
        mm = MM.get(int(image.header["xyzt_units"]) & 7, 1.0)
        shape = _three_axes(image)
        if len(shape) < 3 or any(extent != 1 for extent in shape[3:]) or min(shape) < 1 or int(np.prod(shape)) > MAX_VOXELS:
            raise Refusal(119, f"a NIfTI file of {len(shape)} axes; one volume of at most {MAX_VOXELS} voxels is needed")
        voxels = np.asanyarray(image.dataobj).reshape(shape[:3])
        if isinstance(stream, gzip.GzipFile):
            _check_sum(stream)
        matrix = RAS_TO_LPS @ np.diag([mm, mm, mm, 1.0]) @ np.asarray(image.affine, dtype=np.float64)
        if voxels.dtype.kind not in "iuf" or not np.isfinite(matrix).all() or abs(np.linalg.det(matrix)) < 1e-9:
            raise Refusal(117, "NIfTI volume has no usable axes or no real numbers")
        if not (apart := _apart_voxels(image)) <= MAX_APART_VOXELS:  # also where it is no number
            raise Refusal(117, f"qform and sform disagree by {apart:.1f} voxels where the volume lies; one of them must go")
    return voxels, matrix


def is_placed(path: Path) -> bool:
    """Return whether a volume says where it lies; where one without that lies, each reader decides in its own way.

    Raises
    ------
    Refusal
        As `read`.
    """
    with refusing(117, "NIfTI volume is damaged"), path.open("rb") as raw:
        header = _image(_stream(raw)).header
        return int(header["qform_code"]) > 0 or int(header["sform_code"]) > 0


def _three_axes(image: Any) -> tuple[int, ...]:  # noqa: ANN401  # nibabel carries no types
    """Return the shape of an image; those of a slice are its rows and columns, and 1."""
    return (*image.shape, 1) if len(image.shape) == 2 else image.shape


def _stream(raw: BinaryIO) -> BinaryIO | gzip.GzipFile:
    """Return the content of a file that may be gzipped."""
    compressed = raw.read(2) == b"\x1f\x8b"
    raw.seek(0)
    return gzip.GzipFile(fileobj=raw) if compressed else raw


def _check_sum(stream: gzip.GzipFile) -> None:
    """Read on to where the checksum stands (RFC 1952, 2.3.1), which is not looked at before; bits may have changed on a disk."""
    left = MAX_BEHIND_BYTES
    while left > 0 and (behind := stream.read(min(left, 2**20))):
        left -= len(behind)


def _apart_voxels(image: Any) -> float:  # noqa: ANN401  # nibabel carries no types
    """Return how far the header's two matrices place a voxel apart at most, 0 where it has but one of them.

    Readers take either of the two: a mask may have been drawn on the one and be read by the other.
    """
    (qform, in_q), (sform, in_s) = (of(coded=True) for of in (image.header.get_qform, image.header.get_sform))
    if in_q < 1 or in_s < 1:
        return 0.0
    corners_84 = np.asarray(
        list(itertools.product(*([0, extent - 1] for extent in _three_axes(image)[:3]), [1])), dtype=np.float64
    )
    return float(np.abs(corners_84 @ (np.linalg.inv(sform) @ qform - np.eye(4)).T).max())


def _image(stream: Any) -> Any:  # noqa: ANN401  # nibabel carries no types
    import nibabel  # most exports hold no volume

    head = stream.read(348)
    stream.seek(0)
    if b"ni1\0" in head[344:] or head[4:8] == b"ni2\0":
        raise Refusal(116, "a header whose voxels lie in another file (.hdr and .img); one file (.nii) is needed")
    kind = nibabel.Nifti2Image if head[:4] in {b"\x1c\x02\0\0", b"\0\0\x02\x1c"} else nibabel.Nifti1Image
    return kind.from_stream(stream)

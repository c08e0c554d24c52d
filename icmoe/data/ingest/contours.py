"""RTSTRUCT: closed planar contours in patient coordinates, filled on the pixels whose centres they enclose."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset
from pydicom.tag import Tag

from icmoe.data.ingest.geometry import Grid, plane_matrix
from icmoe.data.ingest.headers import identity, integer, named_patient, referenced_frames, sequence, text
from icmoe.data.ingest.labels import LabelNames
from icmoe.data.ingest.opening import Refusal, open_dicom, refusing
from icmoe.data.ingest.pseudonyms import Pseudonyms
from icmoe.data.ingest.records import FileRecord, Patch, Plane
from icmoe.data.ingest.refusals import OFF_IMAGE

OFF_PLANE_MM = 0.5
"""How far a contour may lie from the image that it refers to."""
XOR = "CLOSEDPLANAR_XOR"
CLOSED = frozenset({"CLOSED_PLANAR", XOR})
"""Types of contours that enclose something."""


class Outline(NamedTuple):
    """The points of one contour, N x 3, mm, none for one that has no usable points; and whether it is of type `XOR`."""

    points_N3: npt.NDArray[np.float64]
    xor: bool


def record(path: Path, header: Dataset, names: LabelNames, hashes: Pseudonyms) -> FileRecord:
    """Return the record of an RTSTRUCT.

    Parameters
    ----------
    path
        Not used: the header says it all.
    header
        Of the file.
    names
        What regions may be called.
    hashes
        Of the site.

    Raises
    ------
    Refusal
        120 where no region names a class of the study; 117 where the contours cannot be parsed, or enclose nothing.
    """
    del path
    with refusing(117, "contours cannot be parsed"):
        labels = {number: names.index(called) for number, called in _regions(header).items()}
        if not any(label is not None for label in labels.values()):
            raise Refusal(120, f"no region is called like a class of the study (it has {len(labels)})")
        patches, drawn = [], set[int]()
        for number, (region, item) in enumerate(_contours(header)):
            label = labels.get(region)
            if label is None:
                continue
            drawn.add(region)
            if _kind(item) in CLOSED:
                patches.append(_patch(number, label, region, item, hashes))
        if drawn - {patch.group for patch in patches}:  # its images are not background: something is marked there
            raise Refusal(117, "a region is drawn with points or open lines alone, which enclose nothing")
        return FileRecord(
            kind="contours",
            patches=tuple(patches),
            listed=tuple(sorted({hashes.of("uid", uid) for uid in _listed(header)})),
            **(identity(header, hashes) | named_patient(header, hashes) | {"space": _space(header, hashes)}),
        )


def opened(path: Path) -> list[Outline]:
    """Return every contour of a file in its order.

    A record has none without points among its patches: they are of regions that the study does not ask for.

    Raises
    ------
    Refusal
        116 or 117.
    """
    data = open_dicom(path, pixels=False, tags=[Tag("ROIContourSequence")])
    with refusing(117, "contours cannot be parsed"):
        return [Outline(_points_if_any(item), _kind(item) == XOR) for _, item in _contours(data)]


def draw(
    outlines: Sequence[Outline],
    patches: Sequence[Patch],
    grids: Sequence[Grid | None],
    plane: Plane | None,
    shape: tuple[int, int],
) -> npt.NDArray[np.uint8]:
    """Return the class of every pixel of an image.

    Parameters
    ----------
    outlines
        From `opened`.
    patches
        That belong to the image.
    grids
        Not used: contours have none.
    plane
        Of the image; None only where no patch belongs to it.
    shape
        Height and width, pixels.

    Raises
    ------
    Refusal
        121 where a contour does not lie in the image's plane or mostly outside the image.
    """
    del grids
    classes = np.zeros(shape, dtype=np.uint8)
    regions: dict[tuple[int, int], dict[bytes, tuple[npt.NDArray[np.bool_], bool]]] = {}
    for patch in patches:
        assert plane is not None
        outline = outlines[patch.number]
        filled = fill(outline.points_N3, plane, shape)
        parts = regions.setdefault((patch.label, patch.group), {})
        parts.setdefault(filled.tobytes(), (filled, outline.xor))  # written twice, it is no hole in itself
    for (label, _), parts in regions.items():
        marked = joined(parts.values())
        classes[marked] = np.maximum(classes[marked], label)
    return classes


def joined(parts: Iterable[tuple[npt.NDArray[np.bool_], bool]]) -> npt.NDArray[np.bool_]:
    """Return what the contours of one region mark on an image: one within another leaves a hole (PS3.3 C.8.8.6.3).

    Contours that overlap in part are one area, except those of type `XOR`.

    Parameters
    ----------
    parts
        At least one: the pixels within a contour, H x W, and whether it is of type `XOR`.
    """
    (region, _), *further = sorted(parts, key=lambda part: -np.count_nonzero(part[0]))  # an outline before what lies in it
    for filled, xor in further:
        inside, size = np.count_nonzero(region & filled), np.count_nonzero(filled)
        region = region ^ filled if xor or inside in {0, size} else region | filled
    return region


def fill(points_N3: npt.NDArray[np.float64], plane: Plane, shape: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """Return the pixels whose centres a contour encloses.

    Parameters
    ----------
    points_N3
        In patient coordinates, mm.
    plane
        Of the image.
    shape
        Its height and width, pixels.

    Raises
    ------
    Refusal
        121 where the contour does not lie in the image's plane or mostly outside the image.
    """
    from matplotlib.path import Path as Outline  # slow to import, and most exports have no contours

    homogeneous = np.column_stack([points_N3, np.ones(len(points_N3))])
    where = np.linalg.inv(plane_matrix(plane)) @ homogeneous.T
    if np.abs(where[2]).max() > OFF_PLANE_MM:
        raise Refusal(121, f"contour lies {np.abs(where[2]).max():.1f} mm off the plane of its image")
    low, high = np.floor(where[:2].min(axis=1)).astype(int), np.ceil(where[:2].max(axis=1)).astype(int)
    if np.prod((high - low + 1).astype(float)) > 2**26:
        raise Refusal(121, "contour is far larger than its image")
    rows, columns = np.mgrid[low[0] : high[0] + 1, low[1] : high[1] + 1]
    inside = Outline(where[:2].T).contains_points(np.column_stack([rows.ravel(), columns.ravel()]))
    rows, columns = rows.ravel()[inside], columns.ravel()[inside]
    on_image = (rows >= 0) & (rows < shape[0]) & (columns >= 0) & (columns < shape[1])
    if rows.size and on_image.mean() < 0.5:
        raise Refusal(121, OFF_IMAGE)
    filled = np.zeros(shape, dtype=bool)
    filled[rows[on_image], columns[on_image]] = True
    return filled


def _regions(data: Dataset) -> dict[int, list[str]]:
    found = {integer(item, "ROINumber"): [text(item, "ROIName")] for item in sequence(data, "StructureSetROISequence")}
    for item in sequence(data, "RTROIObservationsSequence"):
        called = found.setdefault(integer(item, "ReferencedROINumber"), [])
        called.append(text(item, "ROIObservationLabel"))
        for code in sequence(item, "RTROIIdentificationCodeSequence"):
            scheme, value = text(code, "CodingSchemeDesignator"), text(code, "CodeValue")
            called += [text(code, "CodeMeaning"), value, f"{scheme}:{value}"]
    return {number: [name for name in called if name] for number, called in found.items()}


def _contours(data: Dataset) -> Iterator[tuple[int, Dataset]]:
    for region in sequence(data, "ROIContourSequence"):
        for item in sequence(region, "ContourSequence"):
            yield integer(region, "ReferencedROINumber"), item


def _kind(item: Dataset) -> str:
    return text(item, "ContourGeometricType").upper()


def _patch(number: int, label: int, region: int, item: Dataset, hashes: Pseudonyms) -> Patch:
    source = (sequence(item, "ContourImageSequence") or [Dataset()])[0]
    uid = text(source, "ReferencedSOPInstanceUID")
    x, y, z = (float(value) for value in _points(item)[0])
    return Patch(
        number=number,
        label=label,
        group=region,
        image=hashes.of("uid", uid) if uid else "",
        frame=referenced_frames(source)[0],
        plane=(x, y, z, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
    )


def _points(item: Dataset) -> npt.NDArray[np.float64]:
    points = np.asarray([float(value) for value in item.ContourData], dtype=np.float64).reshape(-1, 3)
    if len(points) < 1 or not np.isfinite(points).all() or np.abs(points).max() > 1e5:
        raise Refusal(117, "a contour has no usable points")
    return points


def _points_if_any(item: Dataset) -> npt.NDArray[np.float64]:
    try:
        return _points(item)
    except Exception:  # noqa: BLE001  # numbers that are none, a count that is no multiple of 3, nothing at all
        return np.empty((0, 3))


def _space(data: Dataset, hashes: Pseudonyms) -> str:
    for item in [*sequence(data, "ReferencedFrameOfReferenceSequence"), *sequence(data, "StructureSetROISequence")]:
        uid = text(item, "FrameOfReferenceUID") or text(item, "ReferencedFrameOfReferenceUID")
        if uid:
            return hashes.of("uid", uid)
    return ""


def _listed(data: Dataset) -> Iterable[str]:
    for space in sequence(data, "ReferencedFrameOfReferenceSequence"):
        for study in sequence(space, "RTReferencedStudySequence"):
            for series in sequence(study, "RTReferencedSeriesSequence"):
                for item in sequence(series, "ContourImageSequence"):
                    yield text(item, "ReferencedSOPInstanceUID")

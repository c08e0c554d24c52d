"""RTSTRUCT: closed planar contours in patient coordinates, filled on the pixels whose centres they enclose or pass through."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset
from pydicom.tag import Tag

from icmoe.data.ingest.filling import ON_OUTLINE_PX, Filled, joined, marked_by, on_image, run_through
from icmoe.data.ingest.geometry import OFF_PLANE_MM, Grid, plane_matrix
from icmoe.data.ingest.headers import all_numbers, identity, integer, named_patient, referenced_frames, sequence, text
from icmoe.data.ingest.labels import LabelNames
from icmoe.data.ingest.opening import Refusal, open_dicom, refusing
from icmoe.data.ingest.pseudonyms import Pseudonyms
from icmoe.data.ingest.records import FileRecord, Patch, Plane
from icmoe.data.ingest.refusals import ACROSS

NO_POINTS = "a contour has no usable points"
OPEN = "a region is drawn there with points or open lines alone, which enclose nothing"
OFFSET = "a contour says that what it marks lies beside its plane (ContourOffsetVector)"
THIN = "a contour encloses no pixel's centre: it is thinner than a pixel, or has fewer than 3 points"
XOR = "CLOSEDPLANAR_XOR"
FLAT = 0.1
"""Most that the points of a contour may spread across its plane, as a share of how far they spread in it."""
CLOSED = frozenset({"CLOSED_PLANAR", XOR})
"""Types of contours that enclose something."""


class Outline(NamedTuple):
    """The points of one contour, N x 3, mm, none where they are of no use; its type in capitals; how far rounding moved them."""

    points_N3: npt.NDArray[np.float64]
    kind: str
    rounded_mm: float = 0.0


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
        120 where no region names a class of the study; 117 where the contours cannot be parsed, or enclose nothing; 121 where
        they lie beside what they mark.
    """
    del path
    with refusing(117, "contours cannot be parsed"):
        labels = {number: names.index(called) for number, called in _regions(header).items() if called}
        if not any(label is not None for label in labels.values()):
            raise Refusal(120, f"no region is called like a class of the study (it has {len(labels)})")
        patches = _drawn(header, labels, hashes)
        own, spaces = _spaces(header, {patch.group for patch in patches})
        apart = len(spaces) > 1 and own <= spaces  # else an anonymiser wrote other UIDs here than there
        if apart and len(own) > 1 and not all(patch.image for patch in patches):
            raise Refusal(122, "regions lie in several frames of reference, and parts of them name no image")
        listed, series = _listed(header, own if apart else spaces)
        meant = spaces if len(spaces) == 1 else own
        space = hashes.of("uid", *meant) if len(meant) == 1 else ""
        return FileRecord(
            kind="contours",
            patches=tuple(patches),
            listed=tuple(sorted(hashes.of("uid", uid) for uid in listed)),
            listed_series=() if listed else tuple(sorted(hashes.of("uid", uid) for uid in series)),
            **(identity(header, hashes) | named_patient(header, hashes) | {"space": space}),
        )


def _drawn(header: Dataset, labels: Mapping[int, int | None], hashes: Pseudonyms) -> list[Patch]:
    """Return the parts of the regions that have a label; of a contour that has no points there is none."""
    patches, closed, bare, written = list[Patch](), set[int](), set[int](), False
    for number, (region, item) in enumerate(_contours(header)):
        if region not in labels and not _is_bare(item):
            raise Refusal(117, "contours name no region, or one without name and description: what they enclose, nobody knows")
        label = labels.get(region)
        written |= label is not None
        if label is None:
            continue
        if _is_bare(item):
            bare.add(region)
            continue
        if any(all_numbers(item, "ContourOffsetVector")):  # of a slab, in earlier editions of the standard
            raise Refusal(121, OFFSET)
        patches += _patches(number, label, region, item, hashes)
        if _kind(item) in CLOSED:
            closed.add(region)
    if not written:  # as templates list every region that may be drawn: it says nothing of any image
        raise Refusal(117, "no region that is called like a class of the study was drawn")
    drawn = {patch.group for patch in patches}
    if bare - drawn:
        raise Refusal(117, NO_POINTS)
    if drawn - closed:  # how far it reaches, nobody knows: no image is background
        raise Refusal(117, "a region is drawn with points or open lines alone, which enclose nothing")
    return patches


def opened(path: Path) -> list[Outline]:
    """Return every contour of a file in its order.

    A record has none without points among its patches.

    Raises
    ------
    Refusal
        116 or 117.
    """
    data = open_dicom(path, pixels=False, tags=[Tag("ROIContourSequence")])
    with refusing(117, "contours cannot be parsed"):
        return [Outline(_points_if_any(item), _kind(item), _rounded_mm(item)) for _, item in _contours(data)]


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
        121 where a contour does not lie in the image's plane or mostly outside the image, or encloses nothing.
    """
    del grids
    classes = np.zeros(shape, dtype=np.uint8)
    regions: dict[tuple[int, int], list[Outline]] = {}
    for patch in patches:
        regions.setdefault((patch.label, patch.group), []).append(outlines[patch.number])
    for (label, _), own in regions.items():
        assert plane is not None
        marked = _region(own, plane, shape)
        classes[marked] = np.maximum(classes[marked], label)
    return classes


def _region(outlines: Iterable[Outline], plane: Plane, shape: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """Return what one region marks on an image; points and open lines beside closed contours are notes."""
    closed = [outline for outline in outlines if outline.kind in CLOSED]
    if not closed:
        raise Refusal(121, OPEN)
    parts, thin = dict[bytes, tuple[Filled, bool]](), list[npt.NDArray[np.float64]]()
    for outline in closed:
        points_N2 = _on_plane(outline.points_N3, plane)
        filled = marked_by(points_N2, shape, max(ON_OUTLINE_PX, outline.rounded_mm / min(plane[9:])))
        if filled is None:
            thin.append(points_N2)
        else:
            key = filled.inside.tobytes() + filled.on_outline.tobytes()
            parts.setdefault(key, (filled, outline.kind == XOR))  # written twice, it is no hole in itself
    region = joined(parts.values()) if parts else np.zeros(shape, dtype=bool)
    for points_N2 in thin:  # a sliver of an area that is marked may be left out, an object of its own may not
        if not region[on_image(run_through(points_N2, within_px=0.5), shape)].any():
            raise Refusal(121, THIN)
    return region


def _on_plane(points_N3: npt.NDArray[np.float64], plane: Plane) -> npt.NDArray[np.float64]:
    """Return the points as rows and columns of the image."""
    homogeneous = np.column_stack([points_N3, np.ones(len(points_N3))])
    where = np.linalg.inv(plane_matrix(plane)) @ homogeneous.T
    if np.ptp(where[2]) > OFF_PLANE_MM:
        raise Refusal(121, ACROSS)
    if np.abs(where[2]).max() > OFF_PLANE_MM:
        raise Refusal(121, f"contour lies {np.abs(where[2]).max():.1f} mm off the plane of its image")
    return np.asarray(where[:2].T)


def _regions(data: Dataset) -> dict[int, list[str]]:
    regions = sequence(data, "StructureSetROISequence")
    found = {integer(item, "ROINumber"): [text(item, "ROIName")] for item in regions}
    if len(found) < len(regions):
        raise Refusal(117, "two regions have one number: whose contours are whose, nobody knows")
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


def _is_bare(item: Dataset) -> bool:
    """Return whether a contour was never drawn: it has no points and does not say that it should have some."""
    written = item.get("ContourData")
    return (written is None or not str(written)) and integer(item, "NumberOfContourPoints") == 0


def _patches(number: int, label: int, region: int, item: Dataset, hashes: Pseudonyms) -> list[Patch]:
    """Return a contour's part of every image, or frame of one, that it names; of none where it names none."""
    points_N3 = _points(item)
    x, y, z = (float(value) for value in points_N3[0])
    sources = [(text(one, "ReferencedSOPInstanceUID"), one) for one in sequence(item, "ContourImageSequence")]
    named = [(hashes.of("uid", uid), frame) for uid, one in sources if uid for frame in referenced_frames(one)]
    return [
        Patch(
            number=number,
            label=label,
            group=region,
            image=image,
            frame=frame,
            plane=(x, y, z, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
            axes=() if named else _across(points_N3),
        )
        for image, frame in dict.fromkeys(named) or [("", -1)]
    ]


def _across(points_N3: npt.NDArray[np.float64]) -> tuple[float, ...]:
    """Return the direction across a contour, none where its points are on a line or in no plane."""
    _, sizes, directions_33 = np.linalg.svd(points_N3 - points_N3.mean(axis=0), full_matrices=False)
    flat = len(sizes) == 3 and sizes[2] <= FLAT * sizes[1]
    return tuple(round(float(part), 3) for part in directions_33[2]) if flat and sizes[1] > OFF_PLANE_MM else ()


def _points(item: Dataset) -> npt.NDArray[np.float64]:
    points = np.asarray([float(value) for value in item.ContourData], dtype=np.float64).reshape(-1, 3)
    if len(points) < 1 or not np.isfinite(points).all() or np.abs(points).max() > 1e5:
        raise Refusal(117, NO_POINTS)
    return points


def _points_if_any(item: Dataset) -> npt.NDArray[np.float64]:
    try:
        return _points(item)
    except Exception:  # noqa: BLE001  # numbers that are none, a count that is no multiple of 3, nothing at all
        return np.empty((0, 3))


def _rounded_mm(item: Dataset) -> float:
    """Return how far rounding to the decimals that are written may have moved a point, at most that of two decimals.

    A mask that was traced through the centres of its outermost pixels is to come back whole, not with notches where rounding
    moved a line inwards; with fewer decimals nobody knows whether numbers were rounded or are whole.
    """
    try:
        decimals = max(len(str(value).partition(".")[2]) for value in item.ContourData)
    except Exception:  # noqa: BLE001  # as `_points_if_any`
        return 0.0
    return float(3.0**0.5 * 0.5 * 10.0 ** -max(2, decimals))  # along each axis


def _spaces(data: Dataset, drawn: Collection[int]) -> tuple[set[str], set[str]]:
    """Return the frames of reference of the regions that are drawn, which each of them names (PS3.3 C.8.8.5), and all listed.

    The object may list further ones, such as those of images that were registered. Where it lists one alone, that is meant.
    """
    regions = [item for item in sequence(data, "StructureSetROISequence") if integer(item, "ROINumber") in drawn]
    own = {text(item, "ReferencedFrameOfReferenceUID") for item in regions}
    listed = {text(item, "FrameOfReferenceUID") for item in sequence(data, "ReferencedFrameOfReferenceSequence")} - {""}
    return own - {""}, listed


def _listed(data: Dataset, spaces: Collection[str]) -> tuple[set[str], set[str]]:
    """Return the instances and the series that the object lists in these frames of reference, in all where there is none."""
    instances, listed = set[str](), set[str]()
    for space in sequence(data, "ReferencedFrameOfReferenceSequence"):
        if spaces and text(space, "FrameOfReferenceUID") not in {"", *spaces}:
            continue
        for study in sequence(space, "RTReferencedStudySequence"):
            for series in sequence(study, "RTReferencedSeriesSequence"):
                listed.add(text(series, "SeriesInstanceUID"))
                instances |= {text(item, "ReferencedSOPInstanceUID") for item in sequence(series, "ContourImageSequence")}
    return instances, listed - {""}

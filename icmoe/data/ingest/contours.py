"""RTSTRUCT: closed planar contours in patient coordinates, filled on the pixels whose centres they enclose or pass through."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset
from pydicom.tag import Tag

from icmoe.data.ingest.geometry import OFF_PLANE_MM, Grid, plane_matrix
from icmoe.data.ingest.headers import identity, integer, named_patient, referenced_frames, sequence, text
from icmoe.data.ingest.labels import LabelNames
from icmoe.data.ingest.opening import Refusal, open_dicom, refusing
from icmoe.data.ingest.pseudonyms import Pseudonyms
from icmoe.data.ingest.records import FileRecord, Patch, Plane
from icmoe.data.ingest.refusals import ACROSS, OFF_IMAGE

ON_OUTLINE_PX = 1e-3
"""How far from an outline, along a row or a column, a pixel's centre lies on it."""
MAX_BOX_PX = 2**26
MAX_OUTLINE_PX = 2**22
TOO_LARGE = "contour is far larger than its image"
NO_POINTS = "a contour has no usable points"
OPEN = "a region is drawn there with points or open lines alone, which enclose nothing"
THIN = "a contour encloses no pixel's centre: it is thinner than a pixel, or has fewer than 3 points"
XOR = "CLOSEDPLANAR_XOR"
CLOSED = frozenset({"CLOSED_PLANAR", XOR})
"""Types of contours that enclose something."""


class Outline(NamedTuple):
    """The points of one contour, N x 3, mm, none for one that has no usable points; and its type in capitals."""

    points_N3: npt.NDArray[np.float64]
    kind: str


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
        return FileRecord(
            kind="contours",
            patches=tuple(_drawn(header, labels, hashes)),
            listed=tuple(sorted({hashes.of("uid", uid) for uid in _listed(header)})),
            **(identity(header, hashes) | named_patient(header, hashes) | {"space": _space(header, labels, hashes)}),
        )


def _drawn(header: Dataset, labels: Mapping[int, int | None], hashes: Pseudonyms) -> list[Patch]:
    """Return the parts of the regions that have a label; of a contour that has no points there is none."""
    patches, closed, bare = list[Patch](), set[int](), set[int]()
    for number, (region, item) in enumerate(_contours(header)):
        label = labels.get(region)
        if label is None:
            continue
        if _is_bare(item):
            bare.add(region)
            continue
        patches += _patches(number, label, region, item, hashes)
        if _kind(item) in CLOSED:
            closed.add(region)
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
        return [Outline(_points_if_any(item), _kind(item)) for _, item in _contours(data)]


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
        filled = _marked(points_N2, shape)
        if filled is None:
            thin.append(points_N2)
        else:
            key = filled.inside.tobytes() + filled.on_outline.tobytes()
            parts.setdefault(key, (filled, outline.kind == XOR))  # written twice, it is no hole in itself
    region = joined(parts.values()) if parts else np.zeros(shape, dtype=bool)
    for points_N2 in thin:  # a sliver of an area that is marked may be left out, an object of its own may not
        if not region[_on_image(_run_through(points_N2, within_px=0.5), shape)].any():
            raise Refusal(121, THIN)
    return region


def _marked(points_N2: npt.NDArray[np.float64], shape: tuple[int, int]) -> Filled | None:
    """Return what a closed contour marks, None where it encloses no more than a line does.

    One no larger than a pixel that encloses no centre marks the pixel that it lies on: small objects are looked for, and their
    image is not background. One of fewer than 3 points marks something only where it was traced from centre to centre.
    """
    filled, corners_N2 = fill(points_N2, shape), np.unique(points_N2, axis=0)
    if len(corners_N2) < 3:
        return filled if np.abs(corners_N2 - np.rint(corners_N2)).max() <= ON_OUTLINE_PX else None
    if not filled.all.any() and np.ptp(corners_N2, axis=0).max() <= 1.0:
        middle_2 = (corners_N2.min(axis=0) + corners_N2.max(axis=0)) / 2
        filled.on_outline[_on_image(np.rint(middle_2)[None].astype(np.int64), shape)] = True
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


def fill(points_N2: npt.NDArray[np.float64], shape: tuple[int, int]) -> Filled:
    """Return the pixels whose centres a contour encloses or runs through, wherever it starts and whichever way it goes.

    Parameters
    ----------
    points_N2
        Rows and columns on the image, pixels.
    shape
        Height and width of the image, pixels.

    Raises
    ------
    Refusal
        121 where the contour lies mostly outside the image.
    """
    low_2, inside = _enclosed(points_N2)
    on_outline = np.zeros_like(inside)
    on_outline[tuple((_run_through(points_N2) - low_2).T)] = True
    inside &= ~on_outline
    filled = Filled(_cropped(inside, low_2, shape), _cropped(on_outline, low_2, shape))
    if 2 * np.count_nonzero(filled.all) < np.count_nonzero(inside) + np.count_nonzero(on_outline):
        raise Refusal(121, OFF_IMAGE)
    return filled


def _on_plane(points_N3: npt.NDArray[np.float64], plane: Plane) -> npt.NDArray[np.float64]:
    """Return the points as rows and columns of the image."""
    homogeneous = np.column_stack([points_N3, np.ones(len(points_N3))])
    where = np.linalg.inv(plane_matrix(plane)) @ homogeneous.T
    if np.ptp(where[2]) > OFF_PLANE_MM:
        raise Refusal(121, ACROSS)
    if np.abs(where[2]).max() > OFF_PLANE_MM:
        raise Refusal(121, f"contour lies {np.abs(where[2]).max():.1f} mm off the plane of its image")
    return np.asarray(where[:2].T)


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


def _run_through(points_N2: npt.NDArray[np.float64], within_px: float = ON_OUTLINE_PX) -> npt.NDArray[np.int64]:
    """Return the pixels, rows and columns, whose centres lie on the closed line through some points, or so close to it.

    Each edge is followed along the axis on which it is longest, whole pixel by whole pixel: of those its centres are.
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


def _on_image(pixels_N2: npt.NDArray[np.int64], shape: tuple[int, int]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the rows and the columns of those that are on the image."""
    rows, columns = pixels_N2[((pixels_N2 >= 0) & (pixels_N2 < shape)).all(axis=1)].T
    return rows, columns


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


def _is_bare(item: Dataset) -> bool:
    """Return whether a contour was never drawn: it has no points and does not say that it should have some."""
    written = item.get("ContourData")
    return (written is None or not str(written)) and integer(item, "NumberOfContourPoints") == 0


def _patches(number: int, label: int, region: int, item: Dataset, hashes: Pseudonyms) -> list[Patch]:
    """Return a contour's part of every image, or frame of one, that it names; of none where it names none."""
    x, y, z = (float(value) for value in _points(item)[0])
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
        )
        for image, frame in dict.fromkeys(named) or [("", -1)]
    ]


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


def _space(data: Dataset, labels: Mapping[int, int | None], hashes: Pseudonyms) -> str:
    """Return the frame of reference of the regions that have a label, which each of them names (PS3.3 C.8.8.5); none of several.

    The object may list further ones, such as those of images that were registered. Where it lists one alone, that is meant.
    """
    regions = [item for item in sequence(data, "StructureSetROISequence") if labels.get(integer(item, "ROINumber")) is not None]
    own = {text(item, "ReferencedFrameOfReferenceUID") for item in regions}
    listed = {text(item, "FrameOfReferenceUID") for item in sequence(data, "ReferencedFrameOfReferenceSequence")} - {""}
    found = listed if len(listed) == 1 else own - {""}
    return hashes.of("uid", found.pop()) if len(found) == 1 else ""


def _listed(data: Dataset) -> Iterable[str]:
    for space in sequence(data, "ReferencedFrameOfReferenceSequence"):
        for study in sequence(space, "RTReferencedStudySequence"):
            for series in sequence(study, "RTReferencedSeriesSequence"):
                for item in sequence(series, "ContourImageSequence"):
                    yield text(item, "ReferencedSOPInstanceUID")

"""What there is to segment: the series of a folder, cut into stacks of parallel planes on one pixel grid, each plane once.

Files are read as ingest reads them, under a key that is forgotten afterwards; masks among them are passed over.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from icmoe.data.ingest.geometry import height_mm, missing_slices
from icmoe.data.ingest.labels import LabelNames
from icmoe.data.ingest.planning import ordered
from icmoe.data.ingest.pseudonyms import SECRET_BYTES, Pseudonyms
from icmoe.data.ingest.reading import Reader
from icmoe.data.ingest.records import FileRecord, Plane, is_image
from icmoe.errors import Fault
from icmoe.study import Label

SAME_AXES = 1e-3
"""How far direction cosines and pixel distances (mm) of one grid may differ: headers round them."""
SAME_PLACE_MM = 0.01
DAMAGED = frozenset({117, 118})
"""Reasons after which a picture may be missing; the others are no pictures."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame of a file: path below the input's root, number from 0, plane where known."""

    path: str
    number: int
    plane: Plane | None


@dataclass(frozen=True, slots=True)
class Stack:
    """Frames of one series on one pixel grid, in their order along the normal; what one segmentation is of.

    Parameters
    ----------
    frames
        At least one; no two in one plane where planes are known.
    shape
        Height and width of each, pixels.
    lacking
        Whether a phase lacks a plane: most planes have more frames than some, and this stack is short of one or may hold one of
        another time in its place.
    """

    frames: tuple[Frame, ...]
    shape: tuple[int, int]
    lacking: bool = False

    @property
    def planes(self) -> list[Plane | None]:
        """The frames' planes."""
        return [frame.plane for frame in self.frames]

    @property
    def gap(self) -> str:
        """What it lacks in words, empty where nothing is known to be missing."""
        if missing := missing_slices(self.planes):
            return f"{missing} slices are missing between the first and the last of {len(self.frames)}"
        what = "some of its planes have fewer phases than most: a slice would be missing, or be one of another phase"
        return what if self.lacking else ""


@dataclass(frozen=True, slots=True)
class Series:
    """One series: records of its files by path, and its stacks, which share one window.

    Parameters
    ----------
    files, stacks
        As said.
    copies
        By path, further files that claim to be the same instance.
    """

    files: dict[str, FileRecord]
    stacks: tuple[Stack, ...]
    copies: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def first(self) -> FileRecord:
        """The record of the first file: kind and modality are those of all."""
        return next(iter(self.files.values()))


def find_series(
    root: Path,
    paths: Sequence[str],
    labels: Sequence[Label],
    *,
    on_progress: Callable[[int, int], None] = lambda *_: None,
    on_passed_over: Callable[[str, str], None] = lambda *_: None,
) -> tuple[list[Series], list[Fault]]:
    """Return the series in files below a folder, and a fault per file that is damaged.

    Parameters
    ----------
    root
        The folder.
    paths
        Files below it.
    labels
        Of the study: masks are told from images by them.
    on_progress
        Called with (read, to read).
    on_passed_over
        Called with (path, why) for each file that is taken for no image.
    """
    reader = Reader(root, Pseudonyms(secrets.token_bytes(SECRET_BYTES)), LabelNames(labels, {}), None)
    grouped: dict[str, dict[str, FileRecord]] = {}
    faults, kept, copies = list[Fault](), dict[str, str](), dict[str, list[str]]()
    for done, path in enumerate(paths, start=1):
        record = reader.read(path)
        if record.fault in DAMAGED:
            did = "It was left out; its series may lack a slice."
            faults.append(Fault(number=record.fault, where=path, what=record.why, did=did))
        elif not is_image(record):
            on_passed_over(
                path, record.why or ("few values, as a mask has" if record.kind in {"volume", "picture"} else "a mask")
            )
        elif record.image in kept:  # a second copy of an instance adds nothing, where it is one
            copies.setdefault(kept[record.image], []).append(path)
        else:
            if record.image:
                kept[record.image] = path
            grouped.setdefault(record.series, {})[path] = record
        on_progress(done, len(paths))
    return [Series(files, _stacks(files), copies) for files in grouped.values()], faults


def _stacks(files: dict[str, FileRecord]) -> tuple[Stack, ...]:
    path, record = next(iter(files.items()))
    if record.kind == "volume":  # a series of its own
        return (_of_volume(path, record),)
    places = [(path, number, place) for path, record in files.items() for number, place in enumerate(record.frames)]
    grids: list[tuple[tuple[int, int, str], Plane | None]] = []
    taken: Counter[tuple[int, int]] = Counter()
    stacks: dict[tuple[int, int], list[Frame]] = {}
    times: dict[tuple[int, int], list[tuple[float, ...]]] = {}
    for path, number, place in ordered(places):
        common = _common(path, files[path], place.plane)
        grid = next((n for n, (one, plane) in enumerate(grids) if one == common and _same_axes(plane, place.plane)), len(grids))
        if grid == len(grids):
            grids.append((common, place.plane))
        repeat = 0  # of a plane: the phases of a heart are a stack each
        if place.plane is not None and (first := grids[grid][1]) is not None:
            height = round(height_mm((*place.plane[:3], *first[3:11])) / SAME_PLACE_MM)
            repeat = taken[grid, height]
            taken[grid, height] += 1
        stacks.setdefault((grid, repeat), []).append(Frame(path, number, place.plane))
        # One frame per file: temporal position and trigger time; else the temporal position alone stands first.
        times.setdefault((grid, repeat), []).append(place.order[: 2 if len(files[path].frames) == 1 else 1])
    lacking = {grid for grid in range(len(grids)) if _some_have_fewer([count for (of, _), count in taken.items() if of == grid])}
    return tuple(
        Stack(
            tuple(frames),
            grids[grid][0][:2],
            lacking=grid in lacking and (len(frames) < len(stacks[grid, 0]) or _overlap(times, grid, repeat)),
        )
        for (grid, repeat), frames in stacks.items()
    )


def _of_volume(path: str, record: FileRecord) -> Stack:
    """Return the stack of a volume: its slices are distinct planes in their order, however near each other (a microscope's)."""
    places = [(path, number, place) for number, place in enumerate(record.frames)]
    if ordered([places[0], places[-1]])[0] is not places[0]:
        places.reverse()
    return Stack(tuple(Frame(path, number, place.plane) for _, number, place in places), (record.rows, record.columns))


def _some_have_fewer(counts: Sequence[int]) -> bool:
    """Return whether most planes have as many frames, and others lack some; a plane that was scanned again is no phase."""
    most = max(counts, default=0)
    return min(counts, default=0) < most and 2 * counts.count(most) > len(counts)


def _overlap(times: Mapping[tuple[int, int], Sequence[tuple[float, ...]]], grid: int, repeat: int) -> bool:
    """Return whether a stack's times reach into those of the stack before it or after it."""
    pairs = ((times.get((grid, at), ()), times.get((grid, at + 1), ())) for at in (repeat - 1, repeat))
    return any(max(before) >= min(after) for before, after in pairs if before and after)


def _common(path: str, record: FileRecord, plane: Plane | None) -> tuple[int, int, str]:
    """Return what frames of one stack have in common besides their axes.

    A multi-frame object is a stack of its own, and so is a DICOM image whose plane is not known.
    """
    alone = len(record.frames) > 1 or (plane is None and record.kind == "image")
    return (record.rows, record.columns, path if alone else "")


def _same_axes(one: Plane | None, other: Plane | None) -> bool:
    if one is None or other is None:
        return one is other
    return all(abs(a - b) <= SAME_AXES for a, b in zip(one[3:], other[3:], strict=True))

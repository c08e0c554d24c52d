"""One series from files to stored frames: grey values and classes upright, window, digests, counts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from icmoe.data.images import OWN_WORDS, is_deep, read_classes, read_grey
from icmoe.data.ingest.burned_in import holds_text
from icmoe.data.ingest.catalogue import Use
from icmoe.data.ingest.forms import MASKS, module_of
from icmoe.data.ingest.geometry import share_within, upright
from icmoe.data.ingest.jobs import SeriesJob, Wanted, file_state
from icmoe.data.ingest.marked import is_a_reading, is_another_part
from icmoe.data.ingest.pixels import Shown, read_pictures
from icmoe.data.ingest.records import FrameResult, Kind, Patch
from icmoe.data.ingest.refusals import ACROSS, CHANGED, OFF_IMAGE, Refusal, refusing
from icmoe.data.ingest.same_instance import agreeing
from icmoe.data.ingest.volumes import SCALING_ERROR, read_volume, through_axis
from icmoe.data.ingest.walking import is_counted
from icmoe.data.picture import Picture, marks_digest, picture_digest, picture_of, ranks_digest
from icmoe.data.store import Stored, entry_path, read_stored, smallest, write_stored
from icmoe.errors import IcmoeError
from icmoe.window import ValueCounts, Window

Classes = npt.NDArray[np.uint8]
MAX_KEPT = 2**22
"""Values of a series' frames that are held in memory at a time."""
TWO_READINGS = "two masks mark the same object differently; exclude one of them"


def decode_series(job: SeriesJob) -> list[FrameResult]:
    """Decode the frames of a series into its store and return what became of each, in their order.

    Of a written frame only the values that occur in it are kept until the window is known, `MAX_KEPT` in all; those beyond
    are read again, so that memory stays that of one frame.
    """
    results, kept = dict[tuple[str, int], FrameResult](), _Kept()
    deep = {frame.path: on_deep_scale(job.root / frame.path, job.kinds[frame.path]) for frame in job.frames}
    counts = {depth: ValueCounts() for depth in deep.values()}
    wanted = {(frame.path, frame.number): frame for frame in job.frames}
    masks, shown = _Masks(job), Shown()
    for key, picture in _pictures(job, shown):
        results[key] = _first_pass(job, wanted[key], picture, masks, counts[deep[key[0]]], kept)
    if not all(_is_as_it_was(job.root / path, state) for path, state in job.states):  # it may be another patient's now
        return [FrameResult(fault=118, why=CHANGED)] * len(wanted)
    stacked = [result for (path, _), result in results.items() if job.kinds[path] != "picture"]  # those are a folder's
    doubt = next((result for result in stacked if result.why in {TWO_READINGS, ACROSS}), None)
    if doubt:  # where two readings agree by chance nobody knows either which is right, nor which slices a contour runs across
        return [doubt] * len(wanted)
    usable = {deep[path] for (path, _), result in results.items() if not result.fault}
    windows = {depth: shown.bound(counts[depth].window()) for depth in usable}
    missing = FrameResult(fault=118, why="the file holds fewer frames than its header says")
    return [_second_pass(job, results.get(key, missing), windows.get(deep[key[0]]), kept) for key in wanted]


def on_deep_scale(path: Path, kind: Kind) -> bool:
    """Return whether a file is a picture of 16 bits; those of 8 beside it are on another scale, and have their own window."""
    return kind == "picture" and is_deep(path)


def _is_as_it_was(path: Path, state: str) -> bool:
    """Return whether a file is as it was when its header was read; of one that cannot be read its frames tell."""
    try:
        now = path.lstat()
    except OSError:
        return True
    return file_state(now.st_size, now.st_mtime_ns) == state


class _Kept:
    """Of each frame what its digest needs: digest of its ranks, and its values as long as there is room."""

    def __init__(self) -> None:
        self.of: dict[str, tuple[bytes, npt.NDArray[Any] | None]] = {}
        self._room = MAX_KEPT

    def add(self, entry: str, ranks: bytes, values_V: npt.NDArray[Any]) -> None:
        """Keep what a written frame needs."""
        self._room -= len(values_V)
        self.of[entry] = (ranks, values_V if self._room >= 0 else None)


def _first_pass(
    job: SeriesJob, frame: Wanted, picture: Picture | Refusal, masks: _Masks, counts: ValueCounts, kept: _Kept
) -> FrameResult:
    if isinstance(picture, Refusal):
        return FrameResult(fault=picture.number, why=picture.why)
    lettered = _lettered(picture, job.kinds[frame.path])
    values_V, turn = picture.values_V, upright(frame.plane)
    try:
        with refusing(104, "mask cannot be decoded"):
            classes = turn.turn(masks.classes(frame, picture.ranks_HW.shape))
        if np.count_nonzero(picture.finite_V) < 2:
            raise Refusal(113, "every pixel has the same value")
    except Refusal as refusal:
        return FrameResult(fault=refusal.number, why=refusal.why, lettered=lettered)
    ranks_HW = turn.turn(picture.ranks_HW)
    by_place = job.kinds[frame.path] == "image" and all(use.form == "volume" for use in frame.uses)
    if by_place and _is_kept_mask(values_V, ranks_HW, classes, job):
        return FrameResult(fault=119, why="its values are the marks themselves: it is a mask that was kept as an image")
    counts.add_counts(values_V, picture.counts_V)
    ranks = ranks_digest(ranks_HW)
    kept.add(frame.entry, ranks, values_V)
    write_stored(_path(job, frame.entry), Stored(values_V, ranks_HW, classes))
    marks = marks_digest(classes)
    return FrameResult(
        entry=frame.entry,
        picture=ranks.hex(),
        rows=ranks_HW.shape[0],
        columns=ranks_HW.shape[1],
        mean=picture.mean,
        class_px=_class_px(classes, len(job.labels)) if marks else (classes.size, *[0] * (len(job.labels) - 1)),
        marks=marks,
        lettered=lettered,
    )


def _is_kept_mask(values_V: npt.NDArray[Any], ranks_HW: npt.NDArray[Any], classes: Classes, job: SeriesJob) -> bool:
    """Return whether a frame holds what masks do, each value where a class of its own is marked."""
    labels = len(job.labels)
    if len(values_V) > labels or not classes.any():
        return False
    if not {0, 1, 255, *(value for label in job.labels for value in label.values)}.issuperset(values_V.tolist()):
        return False
    pairs = np.flatnonzero(np.bincount(ranks_HW.ravel().astype(np.intp) * labels + classes.ravel()))
    return len(pairs) == len({*(pairs // labels).tolist()}) == len({*(pairs % labels).tolist()})


def _class_px(classes: Classes, labels: int) -> tuple[int, ...]:
    """Return the pixels of each class."""
    marked = [int(np.count_nonzero(classes == label)) for label in range(1, labels)]
    return (classes.size - sum(marked), *marked)


def _lettered(picture: Picture, kind: str) -> bool:
    """Return whether a frame as stored holds text; slices of a volume may lie on their side."""
    return holds_text(picture) or (kind == "volume" and holds_text(replace(picture, ranks_HW=picture.ranks_HW.T)))


def _second_pass(job: SeriesJob, result: FrameResult, window: Window | None, kept: _Kept) -> FrameResult:
    if result.fault or window is None:
        return result
    ranks, values_V = kept.of[result.entry]
    if values_V is None:
        values_V = read_stored(_path(job, result.entry)).values_V
    digest = picture_digest(ranks, values_V, window)
    return result.model_copy(update={"digest": digest, "low": window.low, "high": window.high})


def _path(job: SeriesJob, entry: str) -> Path:
    return entry_path(job.store, entry)


def _pictures(job: SeriesJob, shown: Shown) -> Iterator[tuple[tuple[str, int], Picture | Refusal]]:
    """Yield every wanted frame, file by file."""
    by_file: dict[str, list[int]] = {}
    for frame in job.frames:
        by_file.setdefault(frame.path, []).append(frame.number)
    one = {frame.path: frame for frame in job.frames}
    for path, numbers in by_file.items():
        try:
            pictures = frames_of(job.root / path, job.kinds[path], numbers, shown, one[path].plain)
            for copy in one[path].copies:
                pictures = agreeing(pictures, job.root / path, job.root / copy, numbers, shown)
            for number, picture in pictures:
                yield (path, number), picture
        except Refusal as refusal:
            for number in numbers:
                yield (path, number), refusal


def frames_of(
    path: Path, kind: Kind, numbers: Sequence[int], shown: Shown, plain: tuple[str, int]
) -> Iterator[tuple[int, Picture | Refusal]]:
    """Yield the wanted frames of a file in rising order, each as a grey picture as stored or as the reason why it has none.

    Parameters
    ----------
    path
        The file.
    kind
        What its record says that it is.
    numbers
        Frames from 0.
    shown
        Takes in the windows of DICOM frames.
    plain
        `plain` and `pixels_at` of its record.

    Raises
    ------
    Refusal
        Where the file as a whole cannot be read.
    """
    match kind:
        case "picture":
            with refusing(118, "PNG file cannot be decoded"):
                yield 0, picture_of(smallest(read_grey(path, where="")))
        case "volume":
            voxels, matrix = read_volume(path)
            axis = through_axis(matrix, voxels.shape)
            for number in numbers:
                yield number, picture_of(smallest(voxels.take(number, axis=axis)))
        case _:
            yield from read_pictures(path, numbers, shown, plain)


def _are_two_readings(classes: Classes, other: Classes, *, whole: bool) -> bool:
    """Return whether two files contradict each other: they mark one class in places that overlap and differ.

    Marks apart from each other are two objects; files that speak of every pixel (`whole`) contradict where they differ.
    """
    if whole:
        return not np.array_equal(classes, other)
    both = [(classes == label, other == label) for label in np.intersect1d(classes[classes > 0], other)]
    return any(bool((one & two).any()) and not np.array_equal(one, two) for one, two in both)


def _are_parts(use: Use, other: Use) -> bool:
    """Return whether two masks are of two parts of a class, by a side or by which of the names of the class they have."""
    if is_a_reading(use.path) or is_a_reading(other.path):
        return False
    names, others = ({patch.group for patch in one.patches} for one in (use, other))
    return is_another_part(use.path, other.path) or (bool(names and others) and not names & others and 0 not in names | others)


class _Masks:
    """The masks of a series, each file opened once."""

    def __init__(self, job: SeriesJob) -> None:
        self._job = job
        self._open: dict[str, Any] = {}
        self._within: dict[str, float] = {}
        self._marks: dict[str, set[int]] = {}

    def classes(self, frame: Wanted, shape: tuple[int, int]) -> Classes:
        """Return the class of every pixel of a frame as stored, before it is turned upright."""
        classes, others, known = np.zeros(shape, dtype=np.uint8), set[int](), True
        counted = any(is_counted(use.path) for use in frame.uses)
        for place, use in enumerate(frame.uses):
            match use.form:
                case "volume":
                    own = self._volume(use, shape)
                case "picture":
                    own = self._picture(use)
                case form:
                    reader = module_of(MASKS[form])
                    own = reader.draw(self._once(use.path, reader.opened), use.patches, use.grids, frame.plane, shape)
            named = self._classes_in(use)
            known = known and (use.form != "picture" or bool(use.patches))
            apart = use.form in {"volume", "picture"} and known and not named & others  # a file for each class
            if place and not apart:
                parts = counted or all(_are_parts(use, other) for other in frame.uses[:place])
                if _are_two_readings(classes, own, whole=use.form in {"volume", "picture"} and not parts):
                    raise Refusal(122, TWO_READINGS)
            others |= named
            np.maximum(classes, own, out=classes)
        return classes

    def _classes_in(self, use: Use) -> set[int]:
        """Return the classes that a mask marks on any image, as far as that is known."""
        if use.form != "volume":
            return {patch.label for patch in use.patches}
        if use.path not in self._marks:
            self._marks[use.path] = set(np.flatnonzero(np.bincount(self._open[use.path].ravel()))[1:].tolist())
        return self._marks[use.path]

    def _volume(self, use: Use, shape: tuple[int, int]) -> Classes:
        voxels = self._once(use.path, lambda path: self._named(read_volume(path)[0], use.patches))
        if use.path not in self._within:
            uses = (other for frame in self._job.frames for other in frame.uses if other.path == use.path)
            grids = [grid for other in uses for grid in other.grids if grid is not None]
            self._within[use.path] = share_within(voxels, grids, shape)
        if self._within[use.path] < 0.5:
            raise Refusal(121, OFF_IMAGE)
        (grid,) = use.grids
        assert grid is not None
        return np.asarray(grid.take(voxels, shape), dtype=np.uint8)

    def _picture(self, use: Use) -> Classes:
        called = use.patches[0].label if use.patches else 0
        try:
            return read_classes(self._job.root / use.path, self._job.labels, where="", called=called)
        except IcmoeError as error:
            fault = error.faults[0]
            said = f"value {fault.value}" if fault.number == 106 else fault.value if fault.value in OWN_WORDS else ""
            raise Refusal(fault.number, ": ".join(filter(None, ("mask cannot be used", said)))) from None

    def _named(self, voxels: npt.NDArray[Any], patches: Sequence[Patch]) -> Classes:
        """Return class indices for a volume's values, or refuse a value that no label names."""
        if patches:  # it is called like a class
            if (value := float(np.rint(voxels.max(initial=0)))) > 1.0 and value != 255.0:
                raise Refusal(106, f"mask cannot be used: value {value:g}, which means another class than it is called like")
            return (voxels > 0.5).astype(np.uint8) * np.uint8(patches[0].label)
        if voxels.dtype.kind == "f":
            voxels = np.where(np.abs(np.rint(voxels) - voxels) < SCALING_ERROR, np.rint(voxels), voxels)
        classes = np.full_like(voxels, 255, dtype=np.uint8)  # in the volume's own order of memory, which slices follow
        for index, label in enumerate(self._job.labels):
            for value in label.values:
                classes[voxels == value] = index
        if (classes == 255).any():
            unknown = ", ".join(f"{value:g}" for value in np.unique(voxels[classes == 255])[:5])
            raise Refusal(106, f"mask cannot be used: value {unknown}")
        return classes

    def _once(self, path: str, read: Any) -> Any:  # noqa: ANN401  # masks of several forms
        if path not in self._open:
            self._open[path] = read(self._job.root / path)
        return self._open[path]

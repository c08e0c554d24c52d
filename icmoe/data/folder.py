"""Read DIR/<site>/{images,masks} with DIR/splits/{train,val,test}.csv: every file is opened once before anything starts.

What is wrong with one image excludes that image, by number; what is wrong with the splits stops the work.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from icmoe.data.images import LEFT_OUT, is_deep, read_classes, read_grey
from icmoe.data.ingest.folding import composed
from icmoe.data.picture import Picture, marks_digest, picture_digest, picture_of, ranks_digest
from icmoe.data.slices import SiteData, Slice
from icmoe.data.splits import SPLITS, Row, patients_in_two_splits, place_of, read_rows, spacing_mm
from icmoe.errors import NOT_STARTED, Fault, IcmoeError
from icmoe.study import Label
from icmoe.window import ValueCounts, Window

Progress = Callable[[int, int], None]
"""Called with the number of images read so far and the number of all."""


def read_folder(root: Path, labels: Sequence[Label], *, progress: Progress | None = None) -> dict[str, SiteData]:
    """Return every site of a data folder, sorted by name.

    A site without a usable training slice stays in the answer with a fault 108 among its exclusions.

    Parameters
    ----------
    root
        The data folder; each split needs its file DIR/splits/NAME.csv.
    labels
        Classes of the study.
    progress
        Told after each patient how many images were read.

    Raises
    ------
    IcmoeError
        107, 109 and 110: everything that is wrong with the folder's layout and its split files, at once.
    """
    _check_root(root)
    rows: list[Row] = []
    faults: list[Fault] = []
    for name in SPLITS:
        try:
            rows += read_rows(root / "splits" / f"{name}.csv", name, where=f"splits/{name}.csv", same_split=True)
        except IcmoeError as error:
            faults.extend(error.faults)
    faults.extend(patients_in_two_splits(rows))
    if faults:
        raise IcmoeError(*faults)
    names = sorted({row.site for row in rows} | _site_folders(root))
    if not names:
        raise IcmoeError(Fault(number=109, where=root.name, what="no site and no image is listed", did=NOT_STARTED))
    sites = _read_sites(root, rows, names, labels, progress)
    return {name: _with_108(site) for name, site in sites.items()}


def read_split(root: Path, name: str, labels: Sequence[Label], *, progress: Progress | None = None) -> dict[str, SiteData]:
    """Return the sites of one split alone, DIR/splits/NAME.csv or DIR/NAME.csv, sorted by name.

    The split column is not compared with `name`, so that a file that gathers several splits can be read; every slice
    gets `name` as its split.

    Parameters
    ----------
    root
        The data folder.
    name
        Name of the split file without ".csv".
    labels
        Classes of the study.
    progress
        As for `read_folder`.

    Raises
    ------
    IcmoeError
        109 and 110, all faults of the file at once.
    """
    _check_root(root)
    if not name or Path(name).name != name or not name.isprintable():
        raise IcmoeError(Fault(number=109, where=repr(name), what="name of a split is needed, not a path", did=NOT_STARTED))
    where = next((option for option in (f"splits/{name}.csv", f"{name}.csv") if _is(Path.is_file, root / option)), None)
    if where is None:
        what, looked_for = "split file is missing", f"{root}/splits/{name}.csv or {root}/{name}.csv"
        raise IcmoeError(Fault(number=109, where=looked_for, what=what, did=NOT_STARTED))
    rows = read_rows(root / where, name, where=where, same_split=False)
    if not rows:
        raise IcmoeError(Fault(number=110, where=where, what="no image is listed", did=NOT_STARTED))
    return _read_sites(root, rows, sorted({row.site for row in rows}), labels, progress)


def _check_root(root: Path) -> None:
    if not _is(Path.is_dir, root):
        raise IcmoeError(Fault(number=109, where=str(root), what="data folder is not there", did=NOT_STARTED))


def _read_sites(
    root: Path, rows: Sequence[Row], names: Sequence[str], labels: Sequence[Label], progress: Progress | None
) -> dict[str, SiteData]:
    first, twice = _twice(root, rows)
    slices, faults = _read_patients(root, first, labels, progress)
    steps = _steps(rows)
    slices = [replace(item, step=steps[item.site, item.patient, item.split]) for item in slices]
    return {
        name: SiteData(
            name=name,
            slices=tuple(item for item in slices if item.site == name),
            images_found=sum(row.site == name for row in rows),
            exclusions=(*faults.get(name, ()), *twice.get(name, ())),
        )
        for name in names
    }


def _steps(rows: Sequence[Row]) -> dict[tuple[str, str, str], int | None]:
    """Return by site, patient and split the least difference of indices, which is that of neighbours; None where there is one."""
    indices: dict[tuple[str, str, str], set[int]] = {}
    for row in rows:
        indices.setdefault((row.site, row.patient, row.split), set()).add(row.index)
    return {key: min((b - a for a, b in pairwise(sorted(found))), default=None) for key, found in indices.items()}


def _twice(root: Path, rows: Sequence[Row]) -> tuple[list[Row], dict[str, list[Fault]]]:
    """Return the first row of every image, and a fault 112 per further row by site."""
    first: dict[Path, Row] = {}
    twice: dict[str, list[Fault]] = {}
    for row in rows:
        if first.setdefault(place_of(root, row.image), row) is not row:
            twice.setdefault(row.site, []).append(Fault(number=112, where=row.image, did="The first row was used."))
    return list(first.values()), twice


def _read_patients(
    root: Path, rows: Sequence[Row], labels: Sequence[Label], progress: Progress | None
) -> tuple[list[Slice], dict[str, list[Fault]]]:
    """Read patient by patient in threads (decoding releases the GIL), so that few pixels are in memory at a time."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row.site, row.patient, row.split, row.index, row.image)):
        groups.setdefault((row.site, row.patient, row.split), []).append(row)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        jobs = {pool.submit(_read_patient, root, group, labels): len(group) for group in groups.values()}
        done = 0
        for job in as_completed(jobs):
            done += jobs[job]
            if progress:
                progress(done, len(rows))
    slices: list[Slice] = []
    faults: dict[str, list[Fault]] = {}
    for (site, _, _), job in zip(groups, jobs, strict=True):
        usable, refused = job.result()
        slices += usable
        faults.setdefault(site, []).extend(refused)
    return slices, faults


def _read_patient(root: Path, rows: Sequence[Row], labels: Sequence[Label]) -> tuple[list[Slice], list[Fault]]:
    usable: list[tuple[Row, _Checked, tuple[float, float, float] | None]] = []
    faults: list[Fault] = []
    for row in rows:
        try:
            spacing = spacing_mm(row, did=LEFT_OUT)
            usable.append((row, _checked(root, row, labels), spacing))
        except IcmoeError as error:
            faults.extend(error.faults)
    if not usable:
        return [], faults
    counts: dict[bool, ValueCounts] = {}
    for _, checked, _ in usable:
        counts.setdefault(checked.is_deep, ValueCounts()).add_counts(checked.picture.values_V, checked.picture.counts_V)
    windows = {depth: found.window() for depth, found in counts.items()}
    return [_slice(root, row, checked, spacing, windows[checked.is_deep]) for row, checked, spacing in usable], faults


class _Checked(NamedTuple):
    picture: Picture
    is_deep: bool
    """Whether it has 16 bits: those of 8 beside it are on another scale, and have a window of their own."""
    classes: tuple[int, ...]
    marks: str


def _checked(root: Path, row: Row, labels: Sequence[Label]) -> _Checked:
    """Return the image's pixels and its mask's classes once both are known to be usable together.

    Raises
    ------
    IcmoeError
        101-106 or 113, the first that applies.
    """
    pixels = read_grey(place_of(root, row.image), where=row.image)
    classes = read_classes(place_of(root, row.mask), labels, where=row.mask)
    if pixels.shape != classes.shape:
        sizes = [f"{shape[1]} x {shape[0]}" for shape in (classes.shape, pixels.shape)]
        raise IcmoeError(Fault(number=105, where=row.mask, value=sizes[0], limit=sizes[1], did=LEFT_OUT))
    if pixels.min() == pixels.max():
        raise IcmoeError(Fault(number=113, where=row.image, value=f"every pixel is {pixels.flat[0]}", did=LEFT_OUT))
    found = tuple(np.flatnonzero(np.bincount(classes.ravel())).tolist())
    return _Checked(picture_of(pixels), is_deep(place_of(root, row.image)), found, marks_digest(classes))


def _slice(root: Path, row: Row, checked: _Checked, spacing: tuple[float, float, float] | None, window: Window) -> Slice:
    picture = checked.picture
    return Slice(
        site=row.site,
        patient=row.patient,
        index=row.index,
        split=row.split,
        image=place_of(root, row.image),
        mask=place_of(root, row.mask),
        image_digest=picture_digest(ranks_digest(picture.ranks_HW), picture.values_V, window),
        shape=(picture.ranks_HW.shape[0], picture.ranks_HW.shape[1]),
        window=window,
        spacing_mm=spacing,
        classes=checked.classes,
        marks=checked.marks,
    )


def _with_108(site: SiteData) -> SiteData:
    if site.of("train"):
        return site
    found = f"{site.images_found} images listed, {site.images_used} usable, none of them for training"
    fault = Fault(
        number=108, where=site.name, what="site has no usable training image", value=found, did="It takes no part in training."
    )
    return replace(site, exclusions=(*site.exclusions, fault))


def _site_folders(root: Path) -> set[str]:
    return {composed(path.name) for path in _entries(root) if not path.name.startswith(".") and _is(Path.is_dir, path / "images")}


def _entries(folder: Path) -> Iterable[Path]:
    try:
        return list(folder.iterdir())
    except OSError:  # what a split lists there is reported file by file
        return ()


def _is(kind: Callable[[Path], bool], path: Path) -> bool:
    try:
        return kind(path)
    except OSError:
        return False

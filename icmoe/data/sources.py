"""A folder of hospitals, whatever each of them made it from: ingest indexes, or PNG files with split files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from icmoe.data.folder import Progress, read_folder, read_split
from icmoe.data.ingest.index import is_index, read_index
from icmoe.data.ingest.run import store_of
from icmoe.data.slices import SiteData
from icmoe.errors import NOT_STARTED, Fault, IcmoeError
from icmoe.study import Label

_NO_INDEX = "folder has no index for the study's labels"


def read_sites(root: Path, labels: Sequence[Label], *, progress: Progress | None = None) -> dict[str, SiteData]:
    """Return every site below `root`, sorted by name.

    Parameters
    ----------
    root
        DIR/<site>/ with the ingest store of each site, or a folder as `read_folder` takes it.
    labels
        Classes of the study.
    progress
        Told how many images were read.

    Raises
    ------
    IcmoeError
        As `read_index` and `read_folder`.
    """
    stores = _stores(root, labels)
    return {path.name: _indexed(path.name, store) for path, store in stores} or read_folder(root, labels, progress=progress)


def read_sites_split(root: Path, name: str, labels: Sequence[Label], *, progress: Progress | None = None) -> dict[str, SiteData]:
    """Return the slices of one split of every site below `root`; raises as `read_index` and `read_split`."""
    stores = _stores(root, labels)
    if not stores:
        return read_split(root, name, labels, progress=progress)
    sites = {path.name: _indexed(path.name, store) for path, store in stores}
    return {site: _part_of(data, name) for site, data in sites.items()}


def _part_of(data: SiteData, split: str) -> SiteData:
    """Return one split of a site; what was left out has no split, and is counted as found."""
    slices = data.of(split)
    return replace(data, slices=slices, images_found=len(slices) + data.images_found - data.images_used)


def _indexed(name: str, store: Path) -> SiteData:
    """Return what an index offers under the name of its folder here, whatever the site calls itself."""
    data = read_index(store)
    slices = data.slices if data.name == name else tuple(replace(item, site=name) for item in data.slices)
    return replace(data, name=name, slices=slices)


def _stores(root: Path, labels: Sequence[Label]) -> list[tuple[Path, Path]]:
    """Return the folders that have an index for these labels.

    Raises
    ------
    IcmoeError
        131 for each hospital beside them that has none, which would be left out without a word, and where there are indexes for
        other labels alone: no split file is missing then.
    """
    folders = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    stores = [(path, store_of(path, labels)) for path in folders if is_index(store_of(path, labels))]
    if stores:
        others = [path for path in folders if path not in dict(stores) and _is_hospital(path)]
        what, todo = f"{_NO_INDEX}, while others beside it have one", "Ingest it for this study, or move it away."
    else:
        others = [] if (root / "splits").is_dir() else [path for path in folders if _is_only_indexed(path)]
        what, todo = _NO_INDEX, "Give the study the labels that it was ingested for, or ingest it for this study."
    if others:
        raise IcmoeError(*(Fault(number=131, where=path.name, what=what, did=NOT_STARTED, todo=todo) for path in others))
    return stores


def _is_hospital(folder: Path) -> bool:
    return (folder / "images").is_dir() or any(is_index(store) for store in folder.glob("*"))


def _is_only_indexed(folder: Path) -> bool:
    return _is_hospital(folder) and not (folder / "images").is_dir()

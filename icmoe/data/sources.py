"""A folder of hospitals, whatever each of them made it from: ingest indexes, or PNG files with split files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from icmoe.data.folder import Progress, read_folder, read_split
from icmoe.data.ingest.index import is_index, read_index
from icmoe.data.ingest.run import store_of
from icmoe.data.slices import SiteData
from icmoe.study import Label


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
    return {path.name: read_index(store) for path, store in stores} if stores else read_folder(root, labels, progress=progress)


def read_sites_split(root: Path, name: str, labels: Sequence[Label], *, progress: Progress | None = None) -> dict[str, SiteData]:
    """Return the slices of one split of every site below `root`; raises as `read_index` and `read_split`."""
    stores = _stores(root, labels)
    if not stores:
        return read_split(root, name, labels, progress=progress)
    sites = {path.name: read_index(store) for path, store in stores}
    return {site: replace(data, slices=data.of(name)) for site, data in sites.items()}


def _stores(root: Path, labels: Sequence[Label]) -> list[tuple[Path, Path]]:
    folders = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    return [(path, store_of(path, labels)) for path in folders if is_index(store_of(path, labels))]

"""Sites made of one source by a split file, read through the same ingest as a hospital's export."""

from __future__ import annotations

import csv
import filecmp
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import nibabel
import numpy as np

from icmoe.data.ingest.run import Export, ingest, store_of
from icmoe.data.ingest.settings import IngestSettings
from icmoe.errors import NOT_STARTED, Fault, IcmoeError
from icmoe.study import Label
from simulations.evidence.dealing import ONE_CLASS_SITE, read_split

POSTERIOR = 2
OTHER_FORMS = ("*/lv_png/*", "*/myo_png/*", "*/contours/*")
"""Masks of the Sunnybrook data in other forms than DICOM SEG."""


def made_sites(source: Path, split: str, labels: Sequence[Label], place: Path) -> Path:
    """Return the folder of the sites of a split file, ingested; what is there already is not made again.

    Parameters
    ----------
    source
        The data set: DIR/{images,labels}/CASE.nii.gz, or DIR/CASE/ with DICOM files.
    split
        Name of a split file.
    labels
        Of the study.
    place
        Where exports and stores go.

    Raises
    ------
    IcmoeError
        216 for every case of the split file that the source does not hold, and as `ingest`.
    """
    rows = read_split(split)
    absent = [
        row["case"] for row in rows if not (nifti(source, "images", row["case"]).is_file() or (source / row["case"]).is_dir())
    ]
    if absent:
        raise IcmoeError(Fault(number=216, where=str(source), value=", ".join(absent), did=NOT_STARTED))
    for site in sorted({row["site"] for row in rows}):
        mine = [row for row in rows if row["site"] == site]
        export, folder = place / "exports" / site, place / "sites" / site
        for row in mine:
            _copy(source, row, export, cut=_is_cut(row, split))
        ingest(_export(site, mine, export, folder, tuple(labels)))
    return place / "sites"


def other_cases(source: Path, split: str, place: Path) -> list[str]:
    """Return the cases whose copies in `place` are not what the source holds; one without a copy is passed over.

    Parameters
    ----------
    source, split, place
        As for `made_sites`.
    """
    return [row["case"] for row in read_split(split) if any(_is_other(source, *pair) for pair in _copies(row, split, place))]


def _copies(row: dict[str, str], split: str, place: Path) -> Iterator[tuple[Path, Path]]:
    """Yield each file that was copied for a case, with the export that it lies in."""
    case, export = row["case"], place / "exports" / row["site"]
    if _is_cut(row, split):
        return
    single = [nifti(export, kind, case) for kind in ("images", "labels")]
    yield from ((path, export) for path in (*single, *(export / case).rglob("*")) if path.is_file())


def _is_other(source: Path, path: Path, export: Path) -> bool:
    origin = source / path.relative_to(export)
    return not origin.is_file() or not filecmp.cmp(origin, path, shallow=False)


def _is_cut(row: dict[str, str], split: str) -> bool:
    """Return whether a case is written without one class."""
    return split.endswith("one-class") and row["site"] == ONE_CLASS_SITE and row["split"] != "test"


def nifti(root: Path, kind: str, case: str) -> Path:
    """Return where the image ("images") or the mask ("labels") of a case is."""
    return root / kind / f"{case}.nii.gz"


def _copy(source: Path, row: dict[str, str], export: Path, *, cut: bool) -> None:
    case = row["case"]
    if (source / case).is_dir():
        shutil.copytree(source / case, export / case, dirs_exist_ok=True)
        return
    for kind in ("images", "labels"):
        target = nifti(export, kind, case)
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists() and not cut:
            shutil.copy(nifti(source, kind, case), target)
    if cut and not nifti(export, "labels", case).exists():
        _write_anterior(source, case, export)


def _write_anterior(source: Path, case: str, export: Path) -> None:
    """Write the part of a volume in front of its last posterior voxel: a field of view that misses one class."""
    mask = nibabel.load(nifti(source, "labels", case))
    classes = np.asarray(mask.dataobj)
    starts = int(np.flatnonzero((classes == POSTERIOR).any(axis=(0, 2))).max()) + 1
    for kind in ("images", "labels"):
        volume = nibabel.load(nifti(source, kind, case))
        nibabel.save(volume.slicer[:, starts:, :], nifti(export, kind, case))


def _export(site: str, rows: Sequence[dict[str, str]], export: Path, folder: Path, labels: tuple[Label, ...]) -> Export:
    folder.mkdir(parents=True, exist_ok=True)
    splits = folder / "split.csv"
    with splits.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("patient", "split"), *((row["case"], row["split"]) for row in rows)])
    settings = IngestSettings(folder=str(export), patient_pattern=r"([^/]+)\.nii\.gz$", exclude=OTHER_FORMS)
    return Export(
        site=site,
        root=export,
        store=store_of(folder, labels),
        secret_folder=folder,
        labels=labels,
        settings=settings,
        split_file=splits,
    )

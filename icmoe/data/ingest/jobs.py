"""What goes to the processes that read and decode; the process that hands it out needs no package for images itself."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icmoe.data.ingest.catalogue import Use
from icmoe.data.ingest.labels import LabelNames
from icmoe.data.ingest.pseudonyms import Pseudonyms
from icmoe.data.ingest.records import FileRecord, FrameResult, Kind, Plane
from icmoe.study import Label


@dataclass(frozen=True, slots=True)
class FilesJob:
    """Files to read, by their paths below the export, and what reading needs to know of the site."""

    root: Path
    hashes: Pseudonyms
    names: LabelNames
    patient_pattern: str | None
    paths: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Wanted:
    """One frame to decode.

    Parameters
    ----------
    path, number, plane
        File, frame from 0, and where it lies.
    uses
        What masks say about it.
    entry
        Its name in the store.
    plain
        `plain` and `pixels_at` of its file.
    copies
        Other files that claim to be the same instance.
    """

    path: str
    number: int
    plane: Plane | None
    uses: tuple[Use, ...]
    entry: str
    plain: tuple[str, int] = ("", 0)
    copies: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SeriesJob:
    """What a process needs to decode a series."""

    series: str
    root: Path
    store: Path
    labels: tuple[Label, ...]
    kinds: dict[str, Kind]
    frames: tuple[Wanted, ...]
    states: tuple[tuple[str, str], ...] = ()
    """Every file that goes into it, with its `file_state` when its header was read."""


def file_state(size: int, changed: int) -> str:
    """Return a file's size in bytes and its time of change in ns as one text."""
    return f"{size}:{changed}"


def read_files(job: FilesJob) -> list[FileRecord]:
    """Return the records of files."""
    return _from("reading").Reader(job.root, job.hashes, job.names, job.patient_pattern).read_many(job.paths)  # type: ignore[no-any-return]


def decode_series(job: SeriesJob) -> list[FrameResult]:
    """Return what became of each frame of a series."""
    return _from("decoding").decode_series(job)  # type: ignore[no-any-return]


def _from(name: str) -> Any:  # noqa: ANN401  # a module
    return importlib.import_module(f"icmoe.data.ingest.{name}")

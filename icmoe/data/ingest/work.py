"""The two long steps of ingest: reading headers and decoding series, in several processes, committed as they come."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

from icmoe.data.ingest import index, jobs, preloaded  # noqa: F401  # workers are forked from here
from icmoe.data.ingest.catalogue import Catalogue
from icmoe.data.ingest.labels import LabelNames
from icmoe.data.ingest.pairing import pair
from icmoe.data.ingest.parallel import Workers, in_processes
from icmoe.data.ingest.planning import Planned, Site, plan
from icmoe.data.ingest.pseudonyms import Pseudonyms
from icmoe.data.ingest.publishing import Publication
from icmoe.data.ingest.records import FileRecord, FrameResult, refused
from icmoe.data.ingest.refusals import AGAIN
from icmoe.data.ingest.run import ABSENT, BATCH_FILES, DEADLINE_S, Export, Progress

CRASHED = "a decoder crashed or hung on it"
UNKNOWN = "update file set size = null, changed = null where id = ?"


@dataclass(frozen=True, slots=True)
class Work:
    """What both steps need.

    Parameters
    ----------
    connection
        Of the index.
    export, hashes
        What is read.
    files
        Of the export.
    on_progress
        Told at the start of each step and as it goes on.
    """

    connection: sqlite3.Connection
    export: Export
    hashes: Pseudonyms
    files: Catalogue
    on_progress: Progress

    def through(self, splits: Mapping[str, str]) -> None:
        """Read new and changed files, forget those that are gone, decode and publish.

        Parameters
        ----------
        splits
            By the hospital's own number of a patient.
        """
        with Workers(self.export.settings.processes) as workers:
            if self.files.new():
                workers.start()  # before somebody's bars run in a thread
            _read_files(self, workers)
            self.files.drop_gone()
            _publish(self, workers, splits)


def _read_files(work: Work, workers: Workers) -> None:
    """Read the headers of new and changed files into the index."""
    export, files = work.export, work.files
    names = LabelNames(export.labels, export.settings.labels)
    site = export.root, work.hashes, names, export.settings.patient_pattern
    batches = (jobs.FilesJob(*site, tuple(paths)) for paths in files.new_paths(BATCH_FILES))
    done, total = 0, files.new()
    work.on_progress("read", done, total)
    for batch, answer in in_processes(jobs.read_files, batches, workers, deadline_s=DEADLINE_S):
        if answer is None:  # one of them killed its process: find out which
            single = [replace(batch, paths=(path,)) for path in batch.paths]
            answers = in_processes(jobs.read_files, single, workers, deadline_s=DEADLINE_S)
            by_path = {one.paths[0]: found[0] if found else refused(117, CRASHED) for one, found in answers}
        else:
            by_path = dict(zip(batch.paths, answer, strict=True))
        rows = [
            (*_known_as(files.state(path), record), record.model_dump_json(exclude_defaults=True))
            for path, record in by_path.items()
        ]
        with index.transaction(work.connection):
            work.connection.executemany("insert or replace into file values (?, ?, ?, ?)", rows)
        done += len(batch.paths)
        work.on_progress("read", done, total)


def _publish(work: Work, workers: Workers, splits: Mapping[str, str]) -> None:
    """Decode what changed and publish frames and reasons in one transaction.

    Series are planned one by one while others are decoded.
    """
    connection, export, hashes, files = work.connection, work.export, work.hashes, work.files
    forgotten = {name for (name,) in connection.execute("select patient from forgotten")}
    site = Site(export.root, export.store, hashes, export.labels, export.settings.allow, forgotten)
    files.sort(hashes, export.settings.patient_pattern)
    pair(files)
    known = dict(connection.execute("select id, fingerprint from series"))
    publication, marks = Publication(connection, site.allow), dict[str, str]()
    done, total = 0, files.used_frames()

    def missing() -> Iterator[jobs.SeriesJob]:
        nonlocal total
        for planned in plan(files, site):
            publication.note(planned)
            if isinstance(planned, Planned):
                if known.get(planned.job.series) != planned.mark:
                    marks[planned.job.series] = planned.mark
                    yield planned.job
                else:
                    total -= len(planned.job.frames)

    work.on_progress("decode", done, total)
    for job, answer in in_processes(jobs.decode_series, missing(), workers, deadline_s=DEADLINE_S):
        _keep(work, job, answer, marks.pop(job.series))
        done += len(job.frames)
        work.on_progress("decode", done, total)
    fixed = {hashes.patient(number): split for number, split in splits.items()}
    publication.write(partial(_split_of, work, fixed), fixed.keys())
    index.put_meta(connection, {ABSENT: str(len(fixed.keys() - publication.patients()))})


def _keep(work: Work, job: jobs.SeriesJob, answer: list[FrameResult] | None, mark: str) -> None:
    """Write what became of a series into the index; where it did not end well, another run tries again."""
    results = answer if answer is not None else [FrameResult(fault=118, why=CRASHED)] * len(job.frames)
    again = any(result.why in AGAIN for result in results)
    with index.transaction(work.connection):
        index.put_series(work.connection, job.series, "" if again or answer is None else mark, results)
        if again:  # though no file will have changed by then
            work.connection.executemany(UNKNOWN, [(work.files.state(path)[0],) for path, _ in job.states])


def _split_of(work: Work, fixed: Mapping[str, str], patient: str, number: str) -> str:
    """Patients of one number stand in one split, whoever gave it: some files may not name the issuer."""
    share = work.hashes.share(number or patient)
    return fixed.get(patient) or fixed.get(number) or _split(share, work.export.settings.shares)


def _known_as(state: tuple[str, int, int], record: FileRecord) -> tuple[str, int | None, int | None]:
    """Return as what the index knows a file from now on: as none that it will find again, where the next run is to read it."""
    return (state[0], None, None) if record.why in AGAIN else state


def _split(share: float, shares: tuple[float, float, float]) -> str:
    train, val, _ = shares
    return "train" if share < train else "val" if share < train + val else "test"

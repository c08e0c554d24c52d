"""The two long steps of ingest: reading headers and decoding series, in several processes, committed as they come."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from icmoe.data.ingest import index, jobs
from icmoe.data.ingest.copies import without_copies
from icmoe.data.ingest.index import FrameRow, LeftOut
from icmoe.data.ingest.labels import LabelNames
from icmoe.data.ingest.parallel import in_processes
from icmoe.data.ingest.planning import Plan, Site, plan, spacing_of
from icmoe.data.ingest.pseudonyms import Pseudonyms
from icmoe.data.ingest.records import FrameResult, Plane, refused
from icmoe.data.ingest.run import BATCH_FILES, DEADLINE_S, Export, Progress, write_frames

CRASHED = "a decoder crashed or hung on it"


def read_files(
    connection: sqlite3.Connection,
    export: Export,
    hashes: Pseudonyms,
    new: Mapping[str, tuple[str, tuple[int, int]]],
    on_progress: Progress,
) -> None:
    """Read the headers of new and changed files into the index.

    Parameters
    ----------
    connection
        Of the index.
    export, hashes
        What is read.
    new
        Keyed hash, size and time of change by path.
    on_progress
        Told at the start and after each batch.
    """
    names = LabelNames(export.labels, export.settings.labels)
    site = export.root, hashes, names, export.settings.patient_pattern
    paths = list(new)
    batches = [jobs.FilesJob(*site, tuple(paths[at : at + BATCH_FILES])) for at in range(0, len(paths), BATCH_FILES)]
    done = 0
    on_progress("read", done, len(paths))
    for batch, answer in in_processes(jobs.read_files, batches, export.settings.processes, deadline_s=DEADLINE_S):
        if answer is None:  # one of them killed its process: find out which
            single = in_processes(
                jobs.read_files, [replace(batch, paths=(path,)) for path in batch.paths], 1, deadline_s=DEADLINE_S
            )
            by_path = {one.paths[0]: found[0] if found else refused(117, CRASHED) for one, found in single}
        else:
            by_path = dict(zip(batch.paths, answer, strict=True))
        rows = [(new[path][0], *new[path][1], record.model_dump_json(exclude_defaults=True)) for path, record in by_path.items()]
        with index.transaction(connection):
            connection.executemany("insert or replace into file values (?, ?, ?, ?)", rows)
        done += len(batch.paths)
        on_progress("read", done, len(paths))


def publish(
    connection: sqlite3.Connection,
    export: Export,
    hashes: Pseudonyms,
    paths: Mapping[str, str],
    splits: Mapping[str, str],
    on_progress: Progress,
) -> None:
    """Decode what changed and publish frames, reasons and what is gone in one transaction."""
    forgotten = {name for (name,) in connection.execute("select patient from forgotten")}
    site = Site(export.root, export.store, hashes, export.labels, export.settings.allow, forgotten)
    stored = index.records(connection)
    marks = {paths[key]: f"{key}:{size}:{changed}" for key, (size, changed) in index.files(connection).items()}
    records = {path: stored[key] for key, path in sorted(paths.items(), key=lambda item: item[1])}
    made = plan(records, marks, site)
    del stored, records, marks  # the largest things in memory
    known = index.series_results(connection)
    missing = [job for series, (mark, job) in made.jobs.items() if known.get(series, ("", []))[0] != mark]
    total, done = sum(len(job.frames) for job in missing), 0
    on_progress("decode", done, total)
    for job, answer in in_processes(jobs.decode_series, missing, export.settings.processes, deadline_s=DEADLINE_S):
        results = answer if answer is not None else [FrameResult(fault=118, why=CRASHED)] * len(job.frames)
        mark = made.jobs[job.series][0] if answer is not None else ""  # another run tries again
        with index.transaction(connection):
            index.put_series(connection, job.series, mark, results)
        done += len(job.frames)
        on_progress("decode", done, total)
    fixed = {hashes.patient(number): split for number, split in splits.items()}
    rows, out = _frames(
        connection, made, site, lambda patient: fixed.get(patient) or _split(hashes.share(patient), export.settings.shares)
    )
    with index.transaction(connection):
        before = {row.result.digest for row in index.frame_rows(connection)}
        connection.executemany(
            "insert or ignore into gone values (?)", [(digest,) for digest in before - {row.result.digest for row in rows}]
        )
        connection.executemany("delete from series where id = ?", [(key,) for key in known if key not in made.jobs])
        write_frames(connection, rows, out)


def _frames(
    connection: sqlite3.Connection, made: Plan, site: Site, split_of: Callable[[str], str]
) -> tuple[list[FrameRow], list[LeftOut]]:
    out, rows = list(made.left_out), list[FrameRow]()
    planes: dict[str, Plane | None] = {}
    counts: dict[str, int] = {}
    for series, (_, results) in sorted(index.series_results(connection).items()):
        if series not in made.jobs:
            continue
        patient, modality = made.patients[series], made.modalities[series]
        reasons: dict[tuple[int, str], int] = {}
        held = "" if series in site.allow else _text_found(results)
        for result, plane in zip(results, made.planes[series], strict=True):
            if result.fault or held:
                reason = (result.fault, result.why) if result.fault else (126, held)
                reasons[reason] = reasons.get(reason, 0) + 1
                continue
            place = counts[patient] = counts.get(patient, -1) + 1
            planes[result.entry] = plane
            row = FrameRow(
                patient=patient,
                series=series,
                split=split_of(patient),
                index=place,
                modality=modality,
                spacing=None,
                result=result,
            )
            rows.append(row)
        out += [
            LeftOut(subject=series, number=number, why=why, patient=patient, series=series, frames=frames)
            for (number, why), frames in reasons.items()
        ]
    kept, copies = without_copies(rows)
    return _with_spacing(kept, planes), [*out, *copies]


def _with_spacing(rows: Sequence[FrameRow], planes: Mapping[str, Plane | None]) -> list[FrameRow]:
    """Return the frames with the distances of slices, rows and columns, where a patient's frames are one even stack."""
    stacks: dict[str, list[FrameRow]] = {}
    for row in rows:
        stacks.setdefault(row.patient, []).append(row)
    known = {
        patient: spacing_of([planes[row.result.entry] for row in stack])
        for patient, stack in stacks.items()
        if len({row.series for row in stack}) == 1
    }
    return [row.model_copy(update={"spacing": known.get(row.patient)}) for row in rows]


def _text_found(results: Sequence[FrameResult]) -> str:
    """Return why a series is held back whole: who was named in one picture may be named in others where nothing was found.

    Its pixels stay in the store, which is the owner's alone like the export itself, so that allowing it needs no decoding.
    """
    count = sum(result.lettered for result in results)
    return f"letters were found in {count} of its pictures" if count else ""


def _split(share: float, shares: tuple[float, float, float]) -> str:
    train, val, _ = shares
    return "train" if share < train else "val" if share < train + val else "test"

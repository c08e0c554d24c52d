"""From decoded series to what readers of the index see: rows with patient, split and spacing, and reasons for all else.

The results are gone through series by series, three times, so that no more than a series is in memory.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import cast

from icmoe.data.ingest import index
from icmoe.data.ingest.copies import Copies
from icmoe.data.ingest.index import FrameRow, LeftOut
from icmoe.data.ingest.planning import Planned, spacing_of
from icmoe.data.ingest.records import FrameResult, Plane

SCHEMA = """
create table run.planned (id text primary key, patient, number, study, modality, planes);
create table run.left_out (step integer, record text);
create table run.shown (picture, patient, marks);
"""
PLANNED, DECODED, COPIED = range(3)
"""Steps that leave things out, in the order of their reasons."""


@dataclass(frozen=True, slots=True)
class _Series:
    name: str
    patient: str
    modality: str
    planes: tuple[Plane | None, ...]
    results: tuple[FrameResult, ...]
    held: str

    @property
    def usable(self) -> list[tuple[Plane | None, FrameResult]]:
        """What may be used of it, copies included."""
        pairs = zip(self.planes, self.results, strict=True)
        return [] if self.held else [(plane, result) for plane, result in pairs if not result.fault]


class Publication:
    """What a run publishes in the end.

    Parameters
    ----------
    connection
        Of the index, with the run's catalogue.
    allow
        Series that somebody found free of burned-in text.
    """

    def __init__(self, connection: sqlite3.Connection, allow: Collection[str]) -> None:
        self._connection = connection
        self._allow = allow
        connection.executescript(SCHEMA)

    def note(self, planned: Planned | LeftOut) -> None:
        """Take in what was planned."""
        if isinstance(planned, LeftOut):
            self._leave_out(PLANNED, [planned])
            return
        row = planned.job.series, planned.patient, planned.number, planned.study, planned.modality, json.dumps(planned.planes)
        self._connection.execute("insert into run.planned values (?, ?, ?, ?, ?, ?)", row)

    def write(self, split_of: Callable[[str, str], str], fixed: Collection[str] = ()) -> None:
        """Publish frames and reasons in one transaction.

        Parameters
        ----------
        split_of
            Split by patient, and by the hash of the bare number where its issuer is named.
        fixed
            Patients and bare numbers whose split the hospital named.
        """
        for series in self._series():
            self._leave_out(DECODED, _reasons(series))
            shown = [(result.picture, series.patient, result.marks) for _, result in series.usable]
            self._connection.executemany("insert into run.shown values (?, ?, ?)", shown)
        query = "select distinct patient, number from run.planned order by patient, number"
        numbers, known = self._connection.execute(query).fetchall(), {*fixed}
        splits = {patient: split_of(patient, number) for patient, number in numbers}
        named = {patient for patient, number in numbers if {patient, number} & known}
        with index.transaction(self._connection):
            self._connection.execute("delete from series where id not in (select id from run.planned)")
            index.write_frames(self._connection, self._rows(splits, named), self._left_out())

    def patients(self) -> set[str]:
        """Return the pseudonyms of all patients with an image, and those of the bare numbers of issuers' patients."""
        query = "select patient from run.image union select number from run.planned union select name from run.person"
        return {name for (name,) in self._connection.execute(query)}

    def _rows(self, splits: dict[str, str], named: Collection[str]) -> Iterator[FrameRow]:
        of_patient: dict[str, set[str]] = {}
        for series, kept, _ in self._kept(splits, named):
            if kept:
                of_patient.setdefault(series.patient, set()).add(series.name)
        counts: dict[str, int] = {}
        for series, kept, split in self._kept(splits, named, self._leave_out):
            first, usable = counts.get(series.patient, 0), series.usable
            counts[series.patient] = first + len(usable)
            # Where a patient's frames are one even stack, the distances of slices, rows and columns are known.
            single = bool(kept) and len(of_patient[series.patient]) == 1
            spacing = spacing_of([usable[place][0] for place in kept]) if single else None
            for place in kept:
                yield FrameRow(
                    patient=series.patient,
                    series=series.name,
                    split=split,
                    index=first + place,
                    modality=series.modality,
                    spacing=spacing,
                    result=usable[place][1],
                )

    def _kept(
        self,
        splits: dict[str, str],
        named: Collection[str],
        leave_out: Callable[[int, Iterable[LeftOut]], None] = lambda *_: None,
    ) -> Iterator[tuple[_Series, list[int], str]]:
        """Yield every series with the places of those of its usable frames that are no copies, and their split."""
        query = """select picture, patient from run.shown where picture in
            (select picture from run.shown group by picture having count(*) > 1)"""
        patients = {patient: splits[patient] for (patient,) in self._connection.execute("select distinct patient from run.shown")}
        studies = (
            "select distinct study, patient from run.planned where study <> '' and patient in (select patient from run.shown)"
        )
        numbers = """select shared, patient from run.link union select shared, planned.patient from run.link
            join run.planned on shared in (planned.patient, planned.number)"""
        linked = self._connection.execute(f"{studies} union {numbers}")
        marked = "select picture from run.shown group by picture having count(distinct marks) > 1"
        contradicted = {picture for (picture,) in self._connection.execute(marked)}
        copies = Copies(patients, self._connection.execute(query), linked, contradicted, named)
        for series in self._series():
            kept = []
            for place, (_, result) in enumerate(series.usable):
                reason = copies.reason(series.patient, result.picture)
                if reason is None:
                    kept.append(place)
                else:
                    out = LeftOut(
                        subject=series.name, number=reason.number, why=reason.why, patient=series.patient, series=series.name
                    )
                    leave_out(COPIED, [out])
            yield series, kept, copies.split_of(series.patient) if kept else ""

    def _series(self) -> Iterator[_Series]:
        query = "select id, patient, modality, planes, results from planned join series using (id) order by id"
        for name, patient, modality, planes, text in self._connection.execute(query):
            results = tuple(FrameResult.model_validate(item) for item in json.loads(text))
            known = tuple(cast(Plane, tuple(plane)) if plane else None for plane in json.loads(planes))
            yield _Series(name, patient, modality, known, results, "" if name in self._allow else _text_found(results))

    def _leave_out(self, step: int, items: Iterable[LeftOut]) -> None:
        rows = [(step, item.model_dump_json()) for item in items]
        self._connection.executemany("insert into run.left_out values (?, ?)", rows)

    def _left_out(self) -> Iterator[LeftOut]:
        for (text,) in self._connection.execute("select record from run.left_out order by step, rowid"):
            yield LeftOut.model_validate_json(text)


def _reasons(series: _Series) -> list[LeftOut]:
    """Return why frames of a decoded series are not used."""
    frames: dict[tuple[int, str], int] = {}
    for result in series.results:
        if result.fault or series.held:
            reason = (result.fault, result.why) if result.fault else (126, series.held)
            frames[reason] = frames.get(reason, 0) + 1
    return [
        LeftOut(subject=series.name, number=number, why=why, patient=series.patient, series=series.name, frames=count)
        for (number, why), count in frames.items()
    ]


def _text_found(results: Iterable[FrameResult]) -> str:
    """Return why a series is held back whole: who was named in one picture may be named in others where nothing was found.

    Its pixels stay in the store, which is the owner's alone like the export itself, so that allowing it needs no decoding.
    """
    count = sum(result.lettered for result in results)
    return f"letters were found in {count} of its pictures" if count else ""

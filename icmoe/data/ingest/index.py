"""The site's index: SQLite, one row per file, series and frame; every step is one transaction, deleted rows are wiped."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from icmoe.atomic import regular
from icmoe.data.ingest.records import FileRecord, FrameResult, Record
from icmoe.errors import NOT_STARTED, Fault, IcmoeError
from icmoe.locks import hold

if TYPE_CHECKING:
    from icmoe.data.slices import SiteData, Slice

INDEX = "index.sqlite"
STATE = "state"
"""Key of the digest of what readers of the index see, as of the last change."""
SCHEMA = """
create table if not exists meta (key text primary key, value text not null) strict;
create table if not exists file (id text primary key, size integer, changed integer, record text) strict;
create table if not exists series (id text primary key, fingerprint text, results text) strict;
create table if not exists frame (site text, place integer primary key, record text) strict;
create table if not exists left_out (place integer primary key, record text) strict;
create table if not exists forgotten (patient text primary key) strict;
drop table if exists gone;
"""


class FrameRow(Record):
    """One frame that may be used, as training reads it."""

    patient: str
    series: str
    split: str
    index: int
    modality: str
    spacing: tuple[float, float, float] | None
    result: FrameResult


class LeftOut(Record):
    """One thing that is not used: a file, a frame of it or a patient, by its keyed hash."""

    subject: str
    number: int
    why: str
    patient: str = ""
    series: str = ""
    frames: int = 1


_locks: weakref.WeakSet[TextIO] = weakref.WeakSet()
"""Of the indexes that this process has claimed."""


def _let_go() -> None:
    """Close the locks in a forked process: it would hold them for a moment after its parent was killed."""
    for lock in _locks:
        lock.close()


os.register_at_fork(after_in_child=_let_go)


@contextmanager
def claimed(folder: Path) -> Iterator[sqlite3.Connection]:
    """Open the index for writing, one process at a time.

    Yields
    ------
    Connection
        In autocommit mode; `with connection` is not used, transactions are explicit.

    Raises
    ------
    IcmoeError
        129 where the folder or the index cannot be used, 130 where another process holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.fdopen(regular(folder / "lock", os.O_WRONLY | os.O_CREAT), "w")
    except OSError as error:
        raise IcmoeError(Fault(number=129, where=str(folder), value=error.strerror or "", did="Nothing was read.")) from None
    with lock:
        try:
            hold(lock, name=folder, deadline_s=0.0)
        except OSError:
            raise IcmoeError(Fault(number=130, where=str(folder), did="Nothing was read.")) from None
        _locks.add(lock)
        os.close(regular(folder / INDEX, os.O_CREAT | os.O_RDWR, 0o600))
        with _connected(folder) as connection:
            connection.execute("pragma secure_delete = on")
            connection.execute("pragma journal_mode = wal")  # a step then waits for no disk; closing empties the log
            connection.execute("pragma synchronous = normal")
            connection.executescript(SCHEMA)
            yield connection
            with suppress(sqlite3.OperationalError):  # somebody reads it just now, such as `forget` in another process
                connection.execute("pragma main.journal_mode = delete")  # a copy on a disk that is not to be written can be read


@contextmanager
def _connected(folder: Path) -> Iterator[sqlite3.Connection]:
    try:
        with closing(sqlite3.connect(folder / INDEX, timeout=30.0, isolation_level=None)) as connection:
            yield connection
    except sqlite3.OperationalError as error:  # the disk is full, or not to be written
        what, did = "index cannot be used", "What was kept so far stays."
        todo = "Put right what SQLite names, then run the command again."
        raise IcmoeError(Fault(number=129, where=str(folder / INDEX), what=what, value=str(error), did=did, todo=todo)) from None
    except sqlite3.DatabaseError as error:
        what = "index is damaged; move it away and run ingest again"
        raise IcmoeError(Fault(number=129, where=str(folder / INDEX), what=what, value=type(error).__name__)) from None


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Commit what is done inside, or nothing of it.

    Yields
    ------
    None
    """
    connection.execute("begin immediate")
    try:
        yield
    except BaseException:
        connection.execute("rollback")
        raise
    connection.execute("commit")


def meta(connection: sqlite3.Connection, key: str) -> str:
    """Return a value of the index, empty where there is none."""
    row = connection.execute("select value from meta where key = ?", (key,)).fetchone()
    return str(row[0]) if row else ""


def put_meta(connection: sqlite3.Connection, values: Mapping[str, str]) -> None:
    """Write values of the index."""
    connection.executemany("insert or replace into meta values (?, ?)", values.items())


def records(connection: sqlite3.Connection) -> Iterator[tuple[str, FileRecord]]:
    """Yield the keyed hash of every file's path with its record."""
    for key, text in connection.execute("select id, record from file"):
        yield key, FileRecord.model_validate_json(text)


def put_series(connection: sqlite3.Connection, series: str, fingerprint: str, results: Iterable[FrameResult]) -> None:
    """Write the results of one series."""
    text = json.dumps([result.model_dump(mode="json", exclude_defaults=True) for result in results])
    connection.execute("insert or replace into series values (?, ?, ?)", (series, fingerprint, text))


def write_frames(connection: sqlite3.Connection, rows: Iterable[FrameRow], out: Iterable[LeftOut]) -> None:
    """Replace what readers of the index see; `out` is gone through after `rows`."""
    for table, items in (("frame", rows), ("left_out", out)):
        connection.execute(f"delete from {table}")  # noqa: S608  # fixed names
        texts = ((place, item.model_dump_json()) for place, item in enumerate(items))
        connection.executemany(f"insert into {table} (place, record) values (?, ?)", texts)  # noqa: S608


def drop_patients(connection: sqlite3.Connection, names: Iterable[str]) -> int:
    """Take patients out of what readers of the index see and return how many frames went."""
    chosen = (json.dumps(sorted(names)),)
    whose = "where json_extract(record, '$.patient') in (select value from json_each(?))"
    for table in ("frame", "left_out"):
        series = f"select json_extract(record, '$.series') from {table} {whose}"  # noqa: S608  # fixed names, as below
        connection.execute(f"delete from series where id in ({series})", chosen)  # noqa: S608
    connection.execute(f"delete from left_out {whose}", chosen)  # noqa: S608
    return connection.execute(f"delete from frame {whose}", chosen).rowcount  # noqa: S608


def count_of(connection: sqlite3.Connection, names: Iterable[str]) -> int:
    """Return how many frames of these patients may be used."""
    whose = "where json_extract(record, '$.patient') in (select value from json_each(?))"
    (count,) = connection.execute(f"select count(*) from frame {whose}", (json.dumps(sorted(names)),)).fetchone()  # noqa: S608
    return int(count)


def frame_rows(connection: sqlite3.Connection) -> list[FrameRow]:
    """Return the frames that may be used, in order."""
    return [FrameRow.model_validate_json(text) for (text,) in connection.execute("select record from frame order by place")]


def rows_by_series(connection: sqlite3.Connection) -> Iterator[tuple[int, Iterator[FrameRow]]]:
    """Yield how many frames each series has and these frames one after another; series by name, frames in order."""
    counts = connection.execute(
        "select json_extract(record, '$.series') as name, count(*) from frame group by name order by name"
    )
    rows = connection.execute("select record from frame order by json_extract(record, '$.series'), place")
    frames = (FrameRow.model_validate_json(text) for (text,) in rows)
    for _, count in counts:
        yield count, islice(frames, count)


def left_out(connection: sqlite3.Connection) -> list[LeftOut]:
    """Return what is not used."""
    return [LeftOut.model_validate_json(text) for (text,) in connection.execute("select record from left_out order by place")]


def is_index(folder: Path) -> bool:
    """Return whether a folder holds an index."""
    return (folder / INDEX).is_file()


def read_index(folder: Path) -> SiteData:
    """Return what a site's ingest offers.

    Raises
    ------
    IcmoeError
        131 where ingest has not been run to its end, 129 where the index is damaged.
    """
    from icmoe.data.slices import SiteData  # a run on unchanged data comes without arrays

    if not is_index(folder):
        others = any(is_index(other) for other in folder.parent.glob("*"))  # it was run, for a study of other labels
        what = "ingest has not been run since a study with these labels was approved" if others else ""
        raise IcmoeError(Fault(number=131, where=str(folder), what=what, did=NOT_STARTED))
    with opened(folder) as connection:
        site = meta(connection, "site") if meta(connection, "complete") else ""
        if not site:
            raise IcmoeError(Fault(number=131, where=str(folder), what="ingest was not run to its end"))
        rows, out = frame_rows(connection), left_out(connection)
    slices = tuple(_slice(folder, site, row) for row in rows)
    exclusions = tuple(Fault(number=item.number, where=f"{site}/{item.subject}", what=item.why) for item in out)
    found = len(slices) + sum(item.frames for item in out if item.series)
    if not any(item.split == "train" for item in slices):
        value = f"{found} images found, {len(slices)} usable, none of them for training"
        did = "It takes no part in training."
        exclusions += (Fault(number=108, where=site, what="site has no usable training image", value=value, did=did),)
    return SiteData(name=site, slices=slices, images_found=found, exclusions=exclusions)


@contextmanager
def opened(folder: Path) -> Iterator[sqlite3.Connection]:
    """Open an index for reading.

    Yields
    ------
    Connection
        Of an index that exists.
    """
    with _connected(folder) as connection:
        connection.execute("pragma query_only = on")
        yield connection


def state(folder: Path) -> str:
    """Return a digest of the frames that may be used and of what is left out: equal for equal contents."""
    with _connected(folder) as connection:
        return state_of(connection)


def state_of(connection: sqlite3.Connection) -> str:
    """Return the same of an open index."""
    digest = hashlib.sha256()
    for table in ("frame", "left_out"):
        for (text,) in connection.execute(f"select record from {table} order by place"):  # noqa: S608  # fixed names
            digest.update(f"{table} {text}\n".encode())
    return digest.hexdigest()


def _slice(folder: Path, site: str, row: FrameRow) -> Slice:
    from icmoe.data.slices import Slice
    from icmoe.data.store import entry_path
    from icmoe.window import Window

    path = entry_path(folder, row.result.entry)
    return Slice(
        site=site,
        patient=row.patient,
        index=row.index,
        split=row.split,
        image=path,
        mask=path,
        image_digest=row.result.digest,
        shape=(row.result.rows, row.result.columns),
        window=Window(row.result.low, row.result.high),
        spacing_mm=row.spacing,
        modality=row.modality,
        classes=tuple(index for index, pixels in enumerate(row.result.class_px) if pixels),
        marks=row.result.marks,
    )

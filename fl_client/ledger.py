"""The site's ledger: what each round may tell about one patient, written down before the round starts.

One SQLite file per site, in its state folder, for all studies and runs. Each entry is one attempt to train one round. It is
on the disk before the first patient is drawn, so a process killed at any instruction has written too much, never too little:
an attempt that was killed counts although nothing of it left, because a coordinator that sees which attempts fail, and asks
again, would otherwise choose among several draws at the price of one. Only an update that was finished is sent again free.

Entries are chained by their digests. The ledger also keeps count and digest of the audit log's last line, and the audit log
keeps those of the ledger's entries, so that neither of the two files can be shortened or put back alone.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from icmoe.atomic import regular, write_atomically
from icmoe.chain import digest_of
from icmoe.errors import NOTHING_SENT, Fault, IcmoeError
from icmoe.receipts import EMPTY, Head
from icmoe.study import Study

FILE = "ledger.sqlite"
LOCK_S = 60.0
"""Seconds that a process waits for another one's entry; composing a long history takes a few."""

_VERSION = "1"
_ENTRIES = (
    "count INTEGER PRIMARY KEY, time TEXT NOT NULL, study TEXT NOT NULL, name TEXT NOT NULL, kind TEXT NOT NULL,"
    " round INTEGER NOT NULL, incoming TEXT NOT NULL, releases TEXT NOT NULL, previous TEXT NOT NULL, hash TEXT NOT NULL"
)
_SCHEMA = (
    "CREATE TABLE about (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT",
    f"CREATE TABLE entries ({_ENTRIES}) STRICT",
    "CREATE TABLE audit (count INTEGER NOT NULL, digest TEXT NOT NULL) STRICT",
)

_READ_ONLY = {errno.EACCES, errno.EPERM, errno.EROFS}
_PLACE = {sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM, sqlite3.SQLITE_IOERR}
"""Errors of SQLite's that say nothing against the file: it cannot be written to, its disk fails, or a quota is used up."""

Releases = tuple[tuple[float, float, int], ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One attempt to train or score one round.

    Parameters
    ----------
    count
        From 1.
    time
        ISO 8601.
    study, name
        Digest and name of the study.
    kind
        "train" or "evaluate".
    round
        Round of the study.
    incoming
        Digest of the round's global tensors.
    releases
        What may leave: noise multiplier, sample rate and number of equal releases; None without differential privacy.
    previous, hash
        Digests of the entry before and of this one.
    """

    count: int
    time: str
    study: str
    name: str
    kind: str
    round: int
    incoming: str
    releases: Releases
    previous: str = ""
    hash: str = ""

    def row(self) -> dict[str, str | int]:
        """Return the entry as the database holds it."""
        return {**asdict(self), "releases": json.dumps(self.releases)}

    def digest(self) -> str:
        """Return the SHA-256 over everything but `hash`."""
        return digest_of(self.row())


@dataclass(frozen=True, slots=True)
class Book:
    """What a ledger holds.

    Parameters
    ----------
    entries
        In order.
    audit
        The audit log's last line, as far as the ledger knows.
    """

    entries: tuple[Entry, ...] = ()
    audit: Head = EMPTY

    @property
    def head(self) -> Head:
        """The last entry."""
        return Head(self.entries[-1].count, self.entries[-1].hash) if self.entries else EMPTY


def read_ledger(state: Path, site: str, *, deadline_s: float = LOCK_S) -> Book:
    """Return a site's ledger after checking its chain; an empty one where there is none yet.

    Who may only read it, as on a disk that is mounted so, reads it all the same.

    Parameters
    ----------
    state
        The site's state folder.
    site
        Its name.
    deadline_s
        Seconds to wait for another process.

    Raises
    ------
    IcmoeError
        412 where it is damaged or was changed, 414 where it is another site's, 415 where it is locked for too long.
    """
    path = state / FILE
    if not path.exists() and not path.is_symlink():  # a link to nothing, such as a disk that is not mounted, is no new ledger
        return Book()
    with _opened(state, site, deadline_s, reads=True) as connection:
        return _book(connection, path)


def spend(state: Path, site: str, make: Callable[[Book], Entry], *, deadline_s: float = LOCK_S) -> Entry:
    """Add the entry that `make` returns and wait until it is on the disk; no other process can add one meanwhile.

    Parameters
    ----------
    state, site
        As in `read_ledger`; the ledger is made where absent.
    make
        Returns the entry for the ledger as it is now, its `count`, `previous` and `hash` not yet set; raises where the
        budget does not allow it, and nothing is written then.
    deadline_s
        Seconds to wait for another process.

    Raises
    ------
    IcmoeError
        As `read_ledger`, and what `make` raises.
    """
    with _opened(state, site, deadline_s) as connection:
        book = _book(connection, state / FILE)
        entry = _chained(make(book), book.head)
        row = entry.row()
        marks = ", ".join(f":{name}" for name in row)
        connection.execute(f"INSERT INTO entries ({', '.join(row)}) VALUES ({marks})", row)  # noqa: S608
        connection.execute("COMMIT")
    return entry


def new_entry(study: Study, kind: str, round_number: int, incoming: str, releases: Releases) -> Entry:
    """Return an entry that has no place in the chain yet."""
    return Entry(
        count=0,
        time=datetime.now(UTC).isoformat(),
        study=study.digest,
        name=study.name,
        kind=kind,
        round=round_number,
        incoming=incoming,
        releases=releases,
    )


def keep_audit_head(state: Path, site: str, head: Head, *, deadline_s: float = LOCK_S) -> None:
    """Note the audit log's last line; one that another process passed already is not noted.

    Raises
    ------
    IcmoeError
        As `read_ledger`.
    """
    with _opened(state, site, deadline_s) as connection:
        connection.execute("UPDATE audit SET count = ?, digest = ? WHERE count < ?", (head.count, head.digest, head.count))
        connection.execute("COMMIT")


def _chained(entry: Entry, head: Head) -> Entry:
    placed = replace(entry, count=head.count + 1, previous=head.digest)
    return replace(placed, hash=placed.digest())


@contextmanager
def _opened(state: Path, site: str, deadline_s: float, *, reads: bool = False) -> Iterator[sqlite3.Connection]:
    """Yield the site's ledger with its write lock, or a reader's where only that can be had; rolled back unless committed."""
    path = state / FILE
    try:
        if not os.path.lexists(path):  # a link to nothing is no new ledger either
            _make(path, site)
        only_read = _only_read(path, reads=reads)
        address = f"{path.absolute().as_uri()}?mode=ro" if only_read else path
        with closing(sqlite3.connect(address, timeout=deadline_s, isolation_level=None, uri=only_read)) as connection:
            connection.execute("PRAGMA synchronous = EXTRA")  # FULL may lose a commit's last step with the power
            connection.execute("BEGIN" if only_read else "BEGIN IMMEDIATE")  # either way the whole of one commit is seen
            _require_own(connection, path, site)
            yield connection
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}:
            raise IcmoeError(Fault(number=415, where=str(path), limit=f"{deadline_s:g} s", did=NOTHING_SENT)) from None
        if error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_FULL:
            raise IcmoeError(Fault(number=315, where=str(path), value=str(error), did=NOTHING_SENT)) from None
        if error.sqlite_errorcode & 0xFF in _PLACE:
            raise IcmoeError(Fault(number=205, where=str(path), value=str(error), did=NOTHING_SENT)) from None
        raise _damaged(path, str(error)) from None
    except sqlite3.DatabaseError as error:
        raise _damaged(path, str(error)) from None
    except OSError as error:
        number = 315 if error.errno in {errno.ENOSPC, errno.EDQUOT} else 205
        raise IcmoeError(Fault(number=number, where=str(path), value=error.strerror or "", did=NOTHING_SENT)) from None


def _only_read(path: Path, *, reads: bool) -> bool:
    """Return whether the ledger, a regular file, may only be read; for whoever does more than that it is an error."""
    try:
        os.close(regular(path, os.O_RDWR))
    except OSError as error:
        if not reads or error.errno not in _READ_ONLY:
            raise
        os.close(regular(path, os.O_RDONLY))
        return True
    return False


def _make(path: Path, site: str) -> None:
    """Put a new ledger in its place, whole or not at all: an empty file was cut off, and must not pass for a new one."""
    with closing(sqlite3.connect(":memory:")) as new:
        for line in _SCHEMA:
            new.execute(line)
        new.executemany("INSERT INTO about VALUES (?, ?)", [("version", _VERSION), ("site", site)])
        new.execute("INSERT INTO audit VALUES (?, ?)", (EMPTY.count, EMPTY.digest))
        new.commit()
        content = new.serialize()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        write_atomically(fresh, content, private=True)
        with suppress(FileExistsError):  # another process was first, and may have spent already
            _put(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def _put(fresh: Path, path: Path) -> None:
    """Give a file the name `path`, which must be free."""
    try:
        os.link(fresh, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without second names
        with open(path, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write(fresh.read_bytes())


def _require_own(connection: sqlite3.Connection, path: Path, site: str) -> None:
    """Refuse a ledger without tables, and one of another version or site."""
    if not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
        raise _damaged(path, "it was emptied")
    about = dict(connection.execute("SELECT key, value FROM about"))
    if about.get("version") != _VERSION:
        raise _damaged(path, f"version {about.get('version')}")
    if about.get("site") != site:
        raise IcmoeError(Fault(number=414, where=str(path), value=str(about.get("site")), limit=site, did=NOTHING_SENT))


def _book(connection: sqlite3.Connection, path: Path) -> Book:
    names = [field.name for field in fields(Entry)]
    rows = connection.execute(f"SELECT {', '.join(names)} FROM entries ORDER BY count")  # noqa: S608
    try:
        entries = tuple(_entry(dict(zip(names, row, strict=True))) for row in rows)
    except (ValueError, TypeError):
        raise _damaged(path, "an entry cannot be read") from None
    _require_chain(entries, path)
    found = connection.execute("SELECT count, digest FROM audit").fetchall()
    if len(found) != 1:
        raise _damaged(path, "the head of the audit log is not in it")
    return Book(entries, Head(*found[0]))


def _entry(row: dict[str, Any]) -> Entry:
    releases = json.loads(row["releases"])
    return Entry(**{**row, "releases": None if releases is None else tuple((float(a), float(b), int(c)) for a, b, c in releases)})


def _require_chain(entries: Sequence[Entry], path: Path) -> None:
    last = EMPTY
    for entry in entries:
        if (entry.count, entry.previous, entry.hash) != (last.count + 1, last.digest, entry.digest()):
            raise _damaged(path, f"entry {last.count + 1}")
        last = Head(entry.count, entry.hash)


def _damaged(path: Path, value: str) -> IcmoeError:
    return IcmoeError(Fault(number=412, where=str(path), value=value, did=NOTHING_SENT))

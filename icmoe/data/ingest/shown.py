"""Every picture that an index of the site ever offered to training: what may be in the feature cache.

The list is kept beside the site's secret and not in an index, so that an index which was damaged, moved away and made anew
takes nobody's features out of reach of `fl_client forget`.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from icmoe.atomic import regular
from icmoe.data.ingest.index import INDEX
from icmoe.errors import Fault, IcmoeError

SHOWN = "shown.sqlite"
DIGEST = "json_extract(record, '$.result.digest')"


def note_shown(folder: Path, stores: Sequence[Path]) -> None:
    """Note the pictures that readers of the indexes see.

    Parameters
    ----------
    folder
        The site's ingest folder.
    stores
        Folders of its indexes.

    Raises
    ------
    IcmoeError
        129 where the list or an index cannot be used.
    """
    if not stores:  # the folder may not be there yet
        return
    with _opened(folder) as connection:
        for _ in _attached(connection, stores):
            connection.execute(f"insert or ignore into picture select {DIGEST} from store.frame")  # noqa: S608  # fixed names


@contextmanager
def no_longer_shown(folder: Path, stores: Sequence[Path]) -> Iterator[Iterator[str]]:
    """Hand out the pictures that no index offers any more, and take them off the list once that is done.

    Parameters
    ----------
    folder, stores
        As for `note_shown`; all stores of the site.

    Yields
    ------
    iterator of str
        Digests.

    Raises
    ------
    IcmoeError
        As `note_shown`.
    """
    with _opened(folder) as connection:
        connection.execute("create temp table unseen as select digest from picture")
        for _ in _attached(connection, stores):
            connection.execute(f"delete from unseen where digest in (select {DIGEST} from store.frame)")  # noqa: S608
        yield (digest for (digest,) in connection.execute("select digest from unseen"))
        connection.execute("delete from picture where digest in (select digest from unseen)")


@contextmanager
def _opened(folder: Path) -> Iterator[sqlite3.Connection]:
    path = folder / SHOWN
    try:
        os.close(regular(path, os.O_CREAT | os.O_RDWR, 0o600))
    except OSError as error:
        raise IcmoeError(_fault(path, "list of pictures cannot be used", error.strerror or "", "Put that right.")) from None
    try:
        with closing(sqlite3.connect(path, timeout=30.0, isolation_level=None)) as connection:
            connection.execute("pragma secure_delete = on")
            connection.execute("create table if not exists picture (digest text primary key) strict, without rowid")
            yield connection
    except sqlite3.OperationalError as error:  # the disk is full, or not to be written
        todo = "Put right what SQLite names, then run the command again."
        raise IcmoeError(_fault(path, "list of pictures cannot be used", str(error), todo)) from None
    except sqlite3.DatabaseError as error:
        todo = "Remove it, empty the cache of features, then run ingest again."
        raise IcmoeError(_fault(path, "list of pictures or an index is damaged", type(error).__name__, todo)) from None


def _attached(connection: sqlite3.Connection, stores: Sequence[Path]) -> Iterator[Path]:
    for store in stores:
        connection.execute("attach database ? as store", (str(store / INDEX),))
        yield store
        connection.execute("detach database store")


def _fault(path: Path, what: str, value: str, todo: str) -> Fault:
    return Fault(number=129, where=str(path), what=what, value=value, did="No cached features were removed.", todo=todo)

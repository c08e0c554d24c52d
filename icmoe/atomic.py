"""Files that are whole or not there, and files that are files: a named pipe in place of one keeps nobody waiting."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def regular(path: str | Path, flags: int, mode: int = 0o666) -> int:
    """Return the descriptor of a regular file, an opener for `open`: a pipe would wait for its other end, a device never end.

    Raises
    ------
    OSError
        Where the file cannot be opened or is none.
    """
    descriptor = os.open(path, flags | os.O_NONBLOCK, mode)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, "not a regular file", str(path))


def read_regular(path: Path) -> bytes:
    """Return the bytes of a regular file.

    Raises
    ------
    OSError
        As `regular`.
    """
    with open(path, "rb", opener=regular) as file:
        return file.read()


def write_atomically(path: Path, data: bytes, *, durable: bool = True, private: bool = False) -> None:
    """Write `data` to `path` so that a reader sees the old file or the new one, never a part.

    Parameters
    ----------
    path
        Target; its folder is made.
    data
        The bytes.
    durable
        Whether to wait for the disk; not needed for what can be computed again.
    private
        Whether only the owner may read the file, and list its folder where it is made: patient data and what was trained
        on it alone.
    """
    with prepared(path, data, durable=durable, private=private):
        pass


@contextmanager
def prepared(path: Path, data: bytes, *, durable: bool = True, private: bool = False) -> Iterator[None]:
    """Write `data` beside `path`, and put it there when the block has ended well: the disk cannot be too full for that any more.

    Parameters
    ----------
    path, data, durable, private
        As in `write_atomically`.

    Yields
    ------
    None
    """
    name = path.parent / f".{path.name[:32]}.{secrets.token_hex(8)}"
    try:
        with _known_as(path):
            _write(name, path, data, durable=durable, private=private)
        yield
        with _known_as(path):
            name.replace(path)
    except BaseException:
        with suppress(OSError):  # there may be no folder
            name.unlink()
        raise


@contextmanager
def _known_as(path: Path) -> Iterator[None]:
    """Let an error of the file system speak of the name that the caller knows."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


def _write(name: Path, path: Path, data: bytes, *, durable: bool, private: bool) -> None:
    try:
        descriptor = _new(name, private=private)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700 if private else 0o777)
        descriptor = _new(name, private=private)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        if durable:
            file.flush()
            os.fsync(file.fileno())


def _new(path: Path, *, private: bool) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o666)

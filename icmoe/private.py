"""Private files: keys and secrets that only their owner may read."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from icmoe.errors import NOT_STARTED, Fault, IcmoeError, file_fault

LARGEST_KIB = 64
"""Keys, certificates and kits are far smaller; a device or a wrong file ends here."""


@contextmanager
def file_errors() -> Iterator[None]:
    """Turn an error of the file system into a fault.

    Yields
    ------
    None

    Raises
    ------
    IcmoeError
        205 with the file.
    """
    try:
        yield
    except OSError as error:
        raise IcmoeError(file_fault(error)) from None


def read_small(path: Path, largest_kib: int = LARGEST_KIB) -> bytes:
    """Return the bytes of a small regular file.

    Raises
    ------
    IcmoeError
        205 where it cannot be read, is not a regular file or is larger than `largest_kib`.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe must not block
        with os.fdopen(descriptor, "rb") as file:
            found = os.fstat(descriptor)
            data = file.read(1024 * largest_kib + 1) if stat.S_ISREG(found.st_mode) else b""
    except OSError as error:
        raise IcmoeError(Fault(number=205, where=str(path), value=error.strerror or "", did=NOT_STARTED)) from None
    if not stat.S_ISREG(found.st_mode) or len(data) > 1024 * largest_kib:
        limit = f"a regular file of at most {largest_kib} KiB"
        raise IcmoeError(Fault(number=205, where=str(path), limit=limit, did=NOT_STARTED))
    return data


def read_private(path: Path) -> bytes:
    """Return the bytes of a key or secret; refuse it where others may read or change it.

    Raises
    ------
    IcmoeError
        205 as `read_small`, 306 where group or others have any right to the file.
    """
    data = read_small(path)
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        todo = f"Run: chmod 600 {path}; make a new key if anybody may have read it."
        raise IcmoeError(Fault(number=306, where=str(path), value=f"{mode:04o}", limit="0600", did="It was not used.", todo=todo))
    return data

"""Tensors of replies on disk until they are read: a round of a thousand sites does not have to fit into memory."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any
from uuid import uuid4

from flwr.app import Array, ArrayRecord, Message

from icmoe.atomic import write_atomically

SMALL_BYTES = 65536
"""Below this a file costs more than it saves."""


class OnDisk(Array):
    """An array whose bytes are in a file; what travels is where.

    Parameters
    ----------
    dtype, shape, stype
        As Flower says them.
    path
        The file.
    """

    def __init__(self, dtype: str, shape: tuple[int, ...], stype: str, path: Path) -> None:
        self.dtype, self.shape, self.stype, self._path = dtype, shape, stype, path

    def __reduce__(self) -> tuple[type[OnDisk], tuple[Any, ...]]:
        """Travel as the path."""
        return OnDisk, (self.dtype, self.shape, self.stype, self._path)

    @property
    def data(self) -> bytes:  # type: ignore[override]  # is a plain attribute there, which nobody sets
        """The bytes, read anew."""
        return self._path.read_bytes()

    def own(self) -> None:
        """Remove the file with this object."""
        weakref.finalize(self, self._path.unlink, missing_ok=True)


def to_disk(message: Message, folder: Path) -> list[OnDisk]:
    """Move the large arrays of a message to files, unless they are there, and return them.

    Parameters
    ----------
    message
        Any.
    folder
        Where nobody else writes.

    Raises
    ------
    OSError
        Where the disk has no room: it is named, and nothing of the array stays on it, which the message still holds.
    """
    found = list[OnDisk]()
    if not message.has_content():
        return found
    # Not by `array_records`: it refers back to its owner, and the files would stay until the garbage collector comes by.
    for name, record in list(message.content.items()):
        if not isinstance(record, ArrayRecord):
            continue
        kept = ArrayRecord()  # item by item: made of a dict, it would hold plain copies
        for key, array in record.items():
            kept[key] = moved = array if isinstance(array, OnDisk) else _moved(array, folder)
            found += [moved] if isinstance(moved, OnDisk) else []
        message.content[name] = kept
    return found


def _moved(array: Array, folder: Path) -> Array:
    if len(array.data) <= SMALL_BYTES:
        return array
    path = folder / uuid4().hex
    write_atomically(path, array.data, durable=False)
    return OnDisk(array.dtype, array.shape, array.stype, path)

"""Tensors of replies on disk until they are read: a round of a thousand sites does not have to fit into memory."""

from __future__ import annotations

import weakref
from pathlib import Path
from uuid import uuid4

from flwr.app import Array, ArrayRecord, Message

from icmoe.atomic import write_atomically

SMALL_BYTES = 65536
"""Below this a file costs more than it saves."""


class OnDisk(Array):
    """An array whose bytes are in a file, which is removed with it.

    Parameters
    ----------
    array
        What is written.
    folder
        Where; nobody else writes there.
    """

    def __init__(self, array: Array, folder: Path) -> None:
        self.dtype, self.shape, self.stype = array.dtype, array.shape, array.stype
        self._path = folder / uuid4().hex
        write_atomically(self._path, array.data, durable=False)  # a disk without room is named, and nothing stays on it
        weakref.finalize(self, self._path.unlink, missing_ok=True)

    @property
    def data(self) -> bytes:  # type: ignore[override]  # is a plain attribute there, which nobody sets
        """The bytes, read anew."""
        return self._path.read_bytes()


def to_disk(message: Message, folder: Path) -> None:
    """Move the large arrays of a message to files."""
    if not message.has_content():
        return
    # Not by `array_records`: it refers back to its owner, and the files would stay until the garbage collector comes by.
    for name, record in list(message.content.items()):
        if not isinstance(record, ArrayRecord):
            continue
        message.content[name] = kept = ArrayRecord()  # item by item: made of a dict, it would hold plain copies
        for key, array in record.items():
            kept[key] = OnDisk(array, folder) if len(array.data) > SMALL_BYTES else array

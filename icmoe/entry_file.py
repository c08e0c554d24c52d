"""Tensors of a safetensors file read to where they shall be, without a copy between.

safetensors itself hands out arrays of its own: for a batch, every byte is copied once more. Its format is a length, a table in
JSON, and the tensors one after the other (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from icmoe.atomic import regular

LENGTH_BYTES = 8
FIRST_READ_BYTES = 4096
HEADER_MOST_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Place:
    """Where a half-precision tensor lies in its file."""

    shape: tuple[int, ...]
    start: int


class EntryFile:
    """An open file of half-precision tensors; a context manager.

    Parameters
    ----------
    path
        The file.

    Raises
    ------
    OSError, ValueError
        Where it cannot be read, is damaged, or holds another type.
    """

    def __init__(self, path: Path) -> None:
        self._file = regular(path, os.O_RDONLY)
        try:
            self.places = self._table()
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> EntryFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self._file)

    def read_into(self, name: str, row: Tensor) -> None:
        """Fill a contiguous half-precision tensor of the same shape.

        Raises
        ------
        KeyError, ValueError
            Where the file has no such tensor, or one of another shape.
        """
        place = self.places[name]
        if place.shape != tuple(row.shape) or row.dtype != torch.float16:
            raise ValueError(f"{name} is {place.shape}, not {tuple(row.shape)}")
        if os.preadv(self._file, [row.numpy().data.cast("B")], place.start) != row.nbytes:
            raise ValueError("cut off")

    def _table(self) -> dict[str, Place]:
        size = os.fstat(self._file).st_size
        first = os.pread(self._file, FIRST_READ_BYTES, 0)
        length = int.from_bytes(first[:LENGTH_BYTES], "little")
        if not 2 <= length <= min(HEADER_MOST_BYTES, size - LENGTH_BYTES):
            raise ValueError("no table")
        end = LENGTH_BYTES + length
        text = first[LENGTH_BYTES:end] if end <= len(first) else os.pread(self._file, length, LENGTH_BYTES)
        table = json.loads(text)
        if not isinstance(table, dict):
            raise ValueError("no table")
        return {name: _place(row, end, size) for name, row in table.items() if name != "__metadata__"}


def _place(row: Mapping[str, object], data: int, size: int) -> Place:
    """Return where a tensor lies, if the row of the table says so without a contradiction."""
    match row:
        case {"dtype": "F16", "shape": [*shape], "data_offsets": [int(start), int(end)]}:
            sides = tuple(side for side in shape if type(side) is int and side >= 0)
            if len(sides) == len(shape) and start >= 0 and end - start == 2 * math.prod(sides) and data + end <= size:
                return Place(sides, data + start)
    raise ValueError("no table of half-precision tensors")

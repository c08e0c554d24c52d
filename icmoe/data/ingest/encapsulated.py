"""Where the frames of compressed pixels begin: tables of offsets are held against the items that are there (PS3.5 A.4).

pydicom trusts them. An offset that is counted from elsewhere joins the items of two frames, and every later picture would
come out in the place, and under the mask, of the one before it.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator, Sequence
from io import BytesIO
from typing import BinaryIO

from pydicom.encaps import generate_frames, parse_basic_offsets, parse_fragments

from icmoe.data.ingest.refusals import Refusal

ASTRAY = "its table of offsets does not fit the items of its pixels, which do not tell either where each frame begins"
NUMBER_BYTES = 8
"""Of a number of an extended table."""

Offsets = tuple[bytes, bytes]
"""An extended offset table: where frames begin, counted from the first item, and how long they are (PS3.3 C.7.6.3.1.8)."""


def encoded_frames(source: bytes | BinaryIO, count: int, told: Offsets | None = None) -> Iterator[bytes]:
    """Return the compressed frames of an object one after another.

    Parameters
    ----------
    source
        Its pixels, or a file at the first byte of them.
    count
        Number of frames.
    told
        Its extended offset table.

    Raises
    ------
    Refusal
        118 where its table is wrong and its items do not tell either.
    """
    return generate_frames(source, number_of_frames=count, extended_offsets=right_offsets(source, count, told) or told)


def right_offsets(source: bytes | BinaryIO, count: int, told: Offsets | None) -> Offsets | None:
    """Return an extended offset table in place of a wrong table, by which each item is a frame; None where none is wrong.

    Parameters and errors are those of `encoded_frames`; a file is where it was afterwards.
    """
    buffer = BytesIO(source) if isinstance(source, bytes) else source
    start = buffer.tell()
    basic = parse_basic_offsets(buffer)
    table = _numbers(told[0]) if told else tuple(basic)
    if not table or (count == 1 and not told):  # all items are the frame's
        buffer.seek(start)
        return None
    begins, lengths = _items(buffer)
    buffer.seek(start)
    sizes = dict(zip(begins, lengths, strict=True))
    if _is_right(table, begins, count) and (told is None or _are_sizes(table, _numbers(told[1]), sizes)):
        return None
    if len(begins) != count or {*table} == {*begins}:  # in another order than they lie in, readers differ in what it says
        raise Refusal(118, ASTRAY)
    return _packed(begins), _packed(lengths)


def _items(buffer: BinaryIO) -> tuple[list[int], list[int]]:
    """Return where each item behind the table begins, from the first on, and the length of its content."""
    _, places = parse_fragments(buffer)
    lengths = []
    for place in places:
        buffer.seek(place + 4)
        lengths.append(int.from_bytes(buffer.read(4), "little"))
    return [place - places[0] for place in places], lengths


def _is_right(table: Sequence[int], begins: Sequence[int], count: int) -> bool:
    """Return whether each offset is an item's, in rising order from the first on, for all frames."""
    rising = all(one < other for one, other in itertools.pairwise(table))
    return len(table) >= count and table[0] == 0 and rising and {*table} <= {*begins}


def _are_sizes(table: Sequence[int], sizes: Sequence[int], lengths: dict[int, int]) -> bool:
    """Return whether frames are as long as their items, which may be padded by a byte."""
    return len(sizes) == len(table) and all(lengths[at] - size in {0, 1} for at, size in zip(table, sizes, strict=True))


def _numbers(packed: bytes) -> tuple[int, ...]:
    count = len(packed) // NUMBER_BYTES
    return struct.unpack(f"<{count}Q", packed[: NUMBER_BYTES * count])


def _packed(numbers: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(numbers)}Q", *numbers)

"""What a compressed frame says of itself, read from its first bytes before a decoder makes room for it.

JPEG and JPEG-LS (ISO 10918-1 B.2, 14495-1 C.2), JPEG 2000 and its high-throughput form (ISO 15444-1 A.5, A.6, I.4).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

JP2 = b"\x00\x00\x00\x0cjP  "
START_OF_FRAME = frozenset({*range(0xC0, 0xD0), 0xF7}) - {0xC4, 0xC8, 0xCC}
EXACT_FRAMES = frozenset({0xC3, 0xC7, 0xCB, 0xCF})
"""Frames of JPEG's lossless processes."""
START_OF_SCAN = 0xDA
JPEG_LS = 0xF7
CODING_STYLE = 0x52
START_OF_TILE = 0x90


@dataclass(frozen=True, slots=True)
class Codestream:
    """A compressed frame.

    Parameters
    ----------
    rows, columns
        Its size, pixels.
    precision
        Bits of one value.
    lossy
        Whether decoded values may be others than those encoded.
    mixed
        Whether it mixed red, green and blue itself (JPEG 2000's component transform), so that decoders give these again.
    """

    rows: int
    columns: int
    precision: int
    lossy: bool
    mixed: bool = False


def codestream_of(encoded: bytes) -> Codestream | None:
    """Return what a frame says of itself, None where that cannot be read."""
    try:
        return _jpeg(encoded) if encoded.startswith(b"\xff\xd8") else _jpeg_2000(encoded, _start(encoded))
    except (IndexError, struct.error):
        return None


def _segments(encoded: bytes, at: int) -> Iterator[tuple[int, int]]:
    """Yield the code of each marker and where the length after it lies."""
    while encoded[at] == 0xFF:
        while encoded[at] == 0xFF:  # markers may be filled up in front
            at += 1
        yield encoded[at], at + 1
        at += 1 + max(2, int.from_bytes(encoded[at + 1 : at + 3], "big"))


def _jpeg(encoded: bytes) -> Codestream | None:
    found = None
    for code, at in _segments(encoded, 2):
        if code in START_OF_FRAME:
            precision, rows, columns = struct.unpack_from(">BHH", encoded, at + 2)
            found = Codestream(rows, columns, precision, lossy=code not in EXACT_FRAMES)
            if code != JPEG_LS:
                return found
        elif code == START_OF_SCAN:
            near = encoded[at + 3 + 2 * encoded[at + 2]]
            return found and Codestream(found.rows, found.columns, found.precision, lossy=near > 0)
    return None


def _start(encoded: bytes) -> int:
    """Return where the codestream in a JP2 file begins, which is a box of it; 0 where it is none."""
    at = 0
    while encoded.startswith(JP2) and encoded[at + 4 : at + 8] != b"jp2c":
        (length,) = struct.unpack_from(">I", encoded, at)
        if length < 8:
            raise IndexError
        at += length
    return at + 8 if at else 0


def _jpeg_2000(encoded: bytes, at: int) -> Codestream | None:
    if encoded[at : at + 4] != b"\xff\x4f\xff\x51":
        return None
    right, bottom, left, top = struct.unpack_from(">IIII", encoded, at + 8)
    precision = (encoded[at + 42] & 0x7F) + 1
    for code, place in _segments(encoded, at + 2):
        if code in {CODING_STYLE, START_OF_TILE}:
            styled = code == CODING_STYLE
            reversible, mixed = styled and encoded[place + 11] == 1, styled and encoded[place + 6] == 1
            return Codestream(bottom - top, right - left, precision, lossy=not reversible, mixed=mixed)
    return None

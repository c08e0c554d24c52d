"""Lookup tables of DICOM (PS3.3 C.7.6.3.1.5, C.11.1.1, C.11.2.1): from the values before a transform to those after it.

pydicom's own are not used for plain tables: one of 8 bits with more than 256 entries wraps round in them, and bytes that are
packed two to a word end in an error. Both are common: a table is as long as its input is deep.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset
from pydicom.pixels import apply_color_lut

from icmoe.data.ingest.headers import integer
from icmoe.data.ingest.refusals import Refusal

NO_TABLE = "a lookup table is shorter than it says, or of a depth that the standard does not know"
COLOURS = ("Red", "Green", "Blue")


def looked_up(
    values: npt.NDArray[Any], descriptor: Sequence[int], stored: bytes | int | Sequence[int], *, little: bool, signed: bool
) -> npt.NDArray[np.uint16]:
    """Return what a table makes of values; those before its first and after its last entry become that entry.

    Parameters
    ----------
    values
        Whole numbers, any shape and integer type.
    descriptor
        Number of entries, first value that is mapped, bits of an entry.
    stored
        The entries.
    little
        Whether the file is little endian.
    signed
        Whether values before the transform can be below zero, whichever of them are there: the first one's sign is theirs.

    Raises
    ------
    Refusal
        118 where the table is not as long or deep as its descriptor says.
    """
    count, first, bits = (int(number) for number in descriptor)
    count = count % 2**16 or 2**16
    first %= 2**16  # the VR may have either sign: files get it wrong, and implicit ones do not say
    if signed and first >= 2**15:
        first -= 2**16
    table = _entries(stored, count, bits, little=little)
    return table[np.clip(values.astype(np.int64) - first, 0, count - 1)]


def coloured(values: npt.NDArray[Any], header: Dataset, *, little: bool) -> npt.NDArray[Any]:
    """Return the colours of a palette's indices, H x W x 3 or more; tables in segments are left to pydicom.

    Raises
    ------
    Refusal
        118 where there is no usable palette.
    """
    if "RedPaletteColorLookupTableData" not in header:
        return apply_color_lut(values, header)
    tables = [
        (header[f"{name}PaletteColorLookupTableDescriptor"].value, header[f"{name}PaletteColorLookupTableData"].value)
        for name in COLOURS
    ]
    signed = integer(header, "PixelRepresentation") == 1
    return np.stack([looked_up(values, *table, little=little, signed=signed) for table in tables], axis=-1)


def _entries(stored: bytes | int | Sequence[int], count: int, bits: int, *, little: bool) -> npt.NDArray[np.uint16]:
    if isinstance(stored, bytes):
        words = np.frombuffer(stored[: len(stored) // 2 * 2], "<u2" if little else ">u2").astype("<u2")
    else:
        words = (np.atleast_1d(np.asarray(stored, dtype=np.int64)) % 2**16).astype("<u2")
    if bits == 8 and len(words) < count:  # two entries to a word, the first in its lower half
        words = words.view(np.uint8).astype("<u2")
    if len(words) < count or not 8 <= bits <= 16:
        raise Refusal(118, NO_TABLE)
    return words[:count]

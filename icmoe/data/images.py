"""PNG files as arrays: grey images, and masks as class indices."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError

from icmoe.errors import Fault, IcmoeError
from icmoe.study import Label

MAX_PIXELS = 2**26
"""Largest image that is decoded; a PNG of a few bytes can claim any size."""

LUMINANCE = (0.299, 0.587, 0.114)
"""Weights of red, green and blue (ITU-R BT.601) for images whose channels differ."""

DEEP_COLOUR = "colour or alpha with 16 bits, of which Pillow would keep 8; save it as grey with 16 bits"

ALPHA_DRAWS = "its alpha differs where its values are equal, so that it shows other marks than they are; save it without alpha"
ZERO_NOT_BLACK = "its palette shows 0 in colour and another value black: a program numbered the colours anew; save it as grey"
TWO_READINGS = "grey of 2 or 4 bits, whose values are classes both as stored and as shown; save it with 8 bits"
TURNED = "it says that it is shown turned (eXIf), so that marks on it may lie elsewhere; save it as it is shown"
COLOUR = "colour instead of one channel"
OWN_WORDS = frozenset({DEEP_COLOUR, TURNED, ALPHA_DRAWS, ZERO_NOT_BLACK, TWO_READINGS, COLOUR})
"""What is said of a file in words of ours; all else is a library's, and may repeat what the file holds."""

LEFT_OUT = "The image was left out."

_UNKNOWN = 255
_DEEP_COLOUR = {b"\x10\x02", b"\x10\x04", b"\x10\x06"}
"""Bit depth and colour type in a PNG's header (ISO/IEC 15948, 11.2.2)."""
_UNREADABLE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def read_grey(path: Path, *, where: str) -> npt.NDArray[Any]:
    """Return a grey image.

    One channel of 8 or 16 bits is kept as it is; colour with equal channels becomes that channel, other colour its
    luminance (`LUMINANCE`, float32); one bit becomes 0 and 255; alpha is ignored. Colour or alpha of 16 bits is refused.

    Parameters
    ----------
    path
        PNG file.
    where
        Its name in faults.

    Returns
    -------
    ndarray
        H x W, uint8, uint16 or float32.

    Raises
    ------
    IcmoeError
        101 where the file is missing, 102 where it cannot be read.
    """
    pixels = _decode(path, where, missing=101, unreadable=102, palette_is_colour=True)
    if pixels.ndim == 2:
        return pixels
    return np.asarray(pixels.astype(np.float32) @ np.asarray(LUMINANCE, dtype=np.float32))


def is_deep(path: Path) -> bool:
    """Return whether a PNG file has more than 8 bits per channel: its values are on another scale than those of 8 bits."""
    try:
        with path.open("rb") as file:
            return file.read(25)[24:] > b"\x08"
    except OSError:  # what reads the pixels tells of it
        return False


def read_classes(path: Path, labels: Sequence[Label], *, where: str, called: int = 0) -> npt.NDArray[np.uint8]:
    """Return a mask as class indices.

    Parameters
    ----------
    path
        PNG file with one channel (or equal ones); a palette's indices are the values. Grey of 1, 2 or 4 bits is shown spread to
        0 to 255, and counts so where labels name all of that; else the numbers that are stored count.
    labels
        Classes of the study; the position is the class index.
    where
        The file's name in faults.
    called
        Class that its name or a folder says, 0 for none: it marks that where it marks one thing alone, as 1 or 255.

    Returns
    -------
    ndarray
        H x W uint8, 0 to K - 1.

    Raises
    ------
    IcmoeError
        103 where the file is missing, 104 where it cannot be read, 106 where it holds a value that no label names.
    """
    values_HW = _decode(path, where, missing=103, unreadable=104, palette_is_colour=False)
    if values_HW.ndim != 2:
        raise _fault(104, where, COLOUR)
    step = _shown_step(path)
    if called and {*np.unique(values_HW).tolist()} - {0} in (set(), {1}, {255}, {step}):
        return (values_HW > 0).astype(np.uint8) * np.uint8(called)
    table = np.full(65536, _UNKNOWN, dtype=np.uint8)
    for index, label in enumerate(labels):
        table[list(label.values)] = index
    classes_HW: npt.NDArray[np.uint8] = table[values_HW]
    stored_HW: npt.NDArray[np.uint8] = table[values_HW // step] if step else classes_HW
    if step and not (stored_HW == _UNKNOWN).any():
        if (classes_HW == _UNKNOWN).any():
            return stored_HW
        if step < 255 and not np.array_equal(stored_HW, classes_HW):
            raise _fault(104, where, TWO_READINGS)
    if (classes_HW == _UNKNOWN).any():
        raise _fault(106, where, _some(np.unique(values_HW[classes_HW == _UNKNOWN])), limit=_named(labels))
    return classes_HW


def _shown_step(path: Path) -> int:
    """Return by how much the values of a grey PNG file of 1, 2 or 4 bits differ when they are shown, 0 of others."""
    try:
        with path.open("rb") as file:
            depth, colour = file.read(26)[24:]
    except (OSError, ValueError):
        return 0
    return 255 // (2**depth - 1) if colour == 0 and depth in {1, 2, 4} else 0


def _decode(path: Path, where: str, *, missing: int, unreadable: int, palette_is_colour: bool) -> npt.NDArray[Any]:
    """Return H x W, or H x W x 3 where the channels differ."""
    try:
        if not path.is_file():
            raise _fault(unreadable, where, "not a file") if path.exists() else _fault(missing, where)
        with path.open("rb") as file:
            if file.read(26)[24:] in _DEEP_COLOUR:
                raise _fault(unreadable, where, DEEP_COLOUR)
        with Image.open(path, formats=("PNG",)) as opened:
            return _pixels(opened, palette_is_colour=palette_is_colour)
    except UnidentifiedImageError:
        raise _fault(unreadable, where, "not a PNG file") from None
    except _UNREADABLE as error:
        # An OSError's text holds the absolute path; its strerror does not.
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise _fault(unreadable, where, reason) from None


def _pixels(opened: Image.Image, *, palette_is_colour: bool) -> npt.NDArray[Any]:
    if opened.width * opened.height > MAX_PIXELS:
        raise ValueError(f"{opened.width} x {opened.height} pixels, more than {MAX_PIXELS}")
    opened.load()
    if opened.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        raise ValueError(TURNED)
    if not palette_is_colour:
        _require_one_reading(opened)
    plain = opened.convert("L") if opened.mode == "1" else opened
    plain = plain.convert("RGBA") if plain.mode == "P" and palette_is_colour else plain  # RGB warns where colours have an alpha
    pixels = np.asarray(plain)
    if pixels.dtype.kind == "i":  # Pillow's 32-bit mode for some 16-bit files
        pixels = pixels.astype(np.uint16)
    if pixels.ndim == 2:
        return pixels
    colour = pixels[..., :1] if pixels.shape[2] < 3 else pixels[..., :3]
    equal = bool((colour == colour[..., :1]).all())
    return np.ascontiguousarray(colour[..., 0]) if equal else colour


def _require_one_reading(mask: Image.Image) -> None:
    """Refuse a mask that a person sees otherwise than its values are: alpha that draws, a palette whose black is not 0."""
    if mask.mode in {"LA", "RGBA"}:
        value_HW, alpha_HW = (np.asarray(mask)[..., channel].astype(np.int64) for channel in (0, -1))
        if len(np.unique(256 * value_HW + alpha_HW)) > len(np.unique(value_HW)):
            raise ValueError(ALPHA_DRAWS)
    if mask.mode == "P":
        indices = np.unique(np.asarray(mask))
        colours_N3 = np.asarray(mask.getpalette(), dtype=np.uint8).reshape(-1, 3)
        black = [index for index in indices if index < len(colours_N3) and not colours_N3[index].any()]
        if indices[0] == 0 and black and black[0] > 0:
            raise ValueError(ZERO_NOT_BLACK)


def _fault(number: int, where: str, value: str = "", limit: str = "") -> IcmoeError:
    return IcmoeError(Fault(number=number, where=where, value=value, limit=limit, did=LEFT_OUT))


def _some(values: npt.NDArray[Any]) -> str:
    return ", ".join(map(str, values[:5])) + (f" and {len(values) - 5} more" if len(values) > 5 else "")


def _named(labels: Sequence[Label]) -> str:
    return ", ".join(str(value) for label in labels for value in label.values)

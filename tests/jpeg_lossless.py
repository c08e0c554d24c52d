"""JPEG lossless (ITU-T T.81, process 14) as a golden encoder: one table of equal codes, three of the seven predictors."""

from __future__ import annotations

import numpy as np

CODE_BITS, CATEGORIES = 5, 17


def jpeg_lossless(grey_HW: np.ndarray, precision: int, predictor: int) -> bytes:
    """Return a JPEG stream of an unsigned picture of `precision` bits; `predictor` is 1 (left), 4 (plane) or 7 (mean)."""
    values = grey_HW.astype(np.int64)
    left, above, corner = values[1:, :-1], values[:-1, 1:], values[:-1, :-1]
    predicted = np.empty_like(values)
    predicted[0, 0] = 1 << (precision - 1)
    predicted[0, 1:], predicted[1:, 0] = values[0, :-1], values[:-1, 0]
    predicted[1:, 1:] = {1: left, 4: left + above - corner, 7: (left + above) >> 1}[predictor]
    bits = "".join(_code(int(step)) for step in ((values - predicted + 32768) % 65536 - 32768).ravel())
    bits += "1" * (-len(bits) % 8)
    scan = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
    table = bytes([0, *(CATEGORIES if length == CODE_BITS else 0 for length in range(1, 17)), *range(CATEGORIES)])
    height, width = (extent.to_bytes(2, "big") for extent in grey_HW.shape)
    frame = bytes([precision]) + height + width + bytes([1, 1, 0x11, 0])
    start = bytes([1, 1, 0, predictor, 0, 0])
    return b"\xff\xd8" + _segment(0xC3, frame) + _segment(0xC4, table) + _segment(0xDA, start) + scan + b"\xff\xd9"


def _code(step: int) -> str:
    """Return the category of a difference and where it lies in it."""
    category = abs(step).bit_length()
    place = step if step >= 0 else step + (1 << category) - 1
    return f"{category:0{CODE_BITS}b}" + (f"{place:0{category}b}" if 0 < category < 16 else "")


def _segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + (len(content) + 2).to_bytes(2, "big") + content

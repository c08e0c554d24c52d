"""Stored DICOM pixels to grey values: what the standard says between the file and the screen, in its order.

Sign and depth, colour to luminance, padding, modality transform, VOI transform, MONOCHROME1 turned round (PS3.3 C.7.6.3,
C.11.1, C.11.2). A linear window does not touch the values: it bounds the window of the whole series (`Shown`), because
scanners write another one into every slice, and equal tissue must stay equal from slice to slice. Decoders are pydicom's.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset
from pydicom.uid import (
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from icmoe.data.images import LUMINANCE
from icmoe.data.ingest.codestreams import Codestream
from icmoe.data.ingest.groups import Groups
from icmoe.data.ingest.headers import (
    GREY,
    SHOWN,
    Header,
    all_numbers,
    first_number,
    integer,
    named,
    numbers,
    numeric,
    sequence,
    text,
    written,
)
from icmoe.data.ingest.opening import Refusal, refusing
from icmoe.data.ingest.stored import UNDECODABLE, Frame, opened, significant_bits
from icmoe.data.ingest.tables import coloured, looked_up
from icmoe.data.picture import Picture, picture_of
from icmoe.data.store import smallest
from icmoe.window import Window

MODALITY_TAGS = ("RescaleSlope", "RescaleIntercept", "RescaleType", "ModalityLUTSequence")
VOI_TAGS = ("WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence")
MAX_DAMAGED = 16
"""Damaged frames of one object after which the rest is not tried."""
PIXEL_DATA = b"\xe0\x7f\x10\x00"
TABLES = ("ModalityLUTSequence", "VOILUTSequence", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
NUMBERS = (*GREY, *SHOWN, "Rows", "Columns", "SamplesPerPixel", "NumberOfFrames")
TERMS = {
    "PhotometricInterpretation": ("MONOCHROME1", "MONOCHROME2"),
    "VOILUTFunction": ("LINEAR", "LINEAR_EXACT", "SIGMOID"),
}
"""Of plain objects."""
Grey = npt.NDArray[np.float32]


@dataclass(slots=True)
class Shown:
    """The grey values that the windows of a series let through: from the lowest end of any frame to the highest of any.

    Parameters
    ----------
    low, high
        The wrong way round before the first frame; infinite once a frame has no window.
    turning_point
        About which all MONOCHROME1 frames of the series are turned, though slopes and depths may differ from slice to slice:
        that of the first one, None before it.
    """

    low: float = np.inf
    high: float = -np.inf
    turning_point: float | None = None

    def add(self, low: float, high: float) -> None:
        """Take in the window of one more frame."""
        self.low, self.high = min(self.low, low), max(self.high, high)

    def bound(self, window: Window) -> Window:
        """Return the part of a window that is let through; all of it where that is nothing."""
        low, high = max(window.low, self.low), min(window.high, self.high)
        return Window(low, high) if low < high else window


def read_pictures(
    path: Path, numbers_wanted: Sequence[int], shown: Shown | None = None, plain: tuple[str, int] = ("", 0)
) -> Iterator[tuple[int, Picture | Refusal]]:
    """Yield the wanted frames of one object in rising order, each as a grey picture or as the reason why it has none.

    A large multi-frame object is read frame by frame from disk, so that memory does not grow with it.

    Parameters
    ----------
    path
        DICOM file with pixels.
    numbers_wanted
        Frame numbers from 0.
    shown
        Takes in the window of every frame.
    plain
        `plain` and `pixels_at` of its record.

    Raises
    ------
    Refusal
        116 or 117 where the header cannot be read.
    """
    shown = shown or Shown()
    values = json.loads(plain[0] or "{}")
    pixels = _plain_pixels(path, values, plain[1]) if values else None
    if pixels is not None:
        frame = Frame(pixels)
        yield 0, _found(lambda _: frame, Groups.of(values), 0, shown)
        return
    with opened(path) as (header, read):
        groups, damaged = Groups.of(header), 0
        found: Picture | Refusal = Refusal(118, UNDECODABLE)
        for number in sorted(set(numbers_wanted)) if integer(header, "NumberOfFrames") > 1 else [0]:
            if damaged <= MAX_DAMAGED:
                found = _found(read, groups, number, shown)
            damaged += isinstance(found, Refusal)
            yield number, found


def _found(read: Callable[[int], Frame] | Refusal, groups: Groups, number: int, shown: Shown) -> Picture | Refusal:
    """Return the picture of one frame, or why it has none."""
    try:
        if isinstance(read, Refusal):
            raise read
        with refusing(118, UNDECODABLE):
            return _picture(read(number), groups, number, shown)
    except Refusal as refusal:
        return refusal


def plain_pixels_of(path: Path, header: Dataset) -> dict[str, Any]:
    """Return the fields `plain` and `pixels_at` of a record, none where the object is not plain or anything about it is odd.

    Parameters
    ----------
    path
        The file.
    header
        Its whitelisted part.
    """
    values: dict[str, Any] = {name: all_numbers(header, name) for name in named(header, NUMBERS)}
    values |= {name: text(header, name) for name in named(header, TERMS)}
    depth, bits, signed = (integer(values, name) for name in ("BitsAllocated", "BitsStored", "PixelRepresentation"))
    syntax, at = header.file_meta.TransferSyntaxUID, int(header.read_to_byte)
    if (
        syntax not in {ImplicitVRLittleEndian, ExplicitVRLittleEndian}
        or named(header, TABLES)
        or not all(values.values())
        or any(values[name] not in terms for name, terms in TERMS.items() if name in values)
        or not {"PixelRepresentation", "PhotometricInterpretation"} <= values.keys()
        or not (signed in {0, 1} and depth in {8, 16} and 1 <= bits <= depth)
        or not (integer(values, "SamplesPerPixel") == 1 and integer(values, "NumberOfFrames") in {0, 1})
    ):
        return {}
    values["head"] = 8 if syntax == ImplicitVRLittleEndian else 12
    with path.open("rb", buffering=0) as file:
        return {"plain": sys.intern(json.dumps(values)), "pixels_at": at} if _at_pixels(file, values, at) else {}


def _at_pixels(file: BinaryIO | FileIO, values: Mapping[str, Any], at: int) -> int:
    """Return how many bytes of pixels lie there, as many as the header says, and go to the first; 0 where they do not."""
    size = integer(values, "Rows") * integer(values, "Columns") * integer(values, "BitsAllocated") // 8
    length, head = size + size % 2, int(values["head"])
    ends = file.seek(0, 2) >= at + head + length
    file.seek(at)
    start = file.read(head)
    return size if ends and start[:4] == PIXEL_DATA and int.from_bytes(start[-4:], "little") == length else 0


def _plain_pixels(path: Path, values: Mapping[str, Any], at: int) -> npt.NDArray[Any] | None:
    """Return the pixels of a plain object, None where they are not where they were."""
    kind = f"<{'i' if integer(values, 'PixelRepresentation') else 'u'}{integer(values, 'BitsAllocated') // 8}"
    with refusing(118, UNDECODABLE), path.open("rb") as file:
        size = _at_pixels(file, values, at)
        return np.frombuffer(file.read(size), dtype=kind).reshape(integer(values, "Rows"), -1) if size else None


def _picture(frame: Frame, groups: Groups, number: int, shown: Shown) -> Picture:
    """Return the grey picture of one decoded frame; all that the header does to a value is done once per value."""
    header, stored = groups.header, frame.pixels
    if isinstance(header, Dataset) and text(header, "PhotometricInterpretation").upper() == "PALETTE COLOR":
        stored = coloured(significant_bits(stored, header, frame.stream), header, little=_is_little(header))
    elif stored.ndim == 3:
        stored = significant_bits(stored, header, frame.stream)
    if stored.ndim == 3:
        shown.add(-np.inf, np.inf)
        return picture_of(smallest(_luminance(stored[..., :3])))
    if stored.ndim != 2:
        raise Refusal(118, f"a frame of {stored.ndim} dimensions")
    picture = picture_of(stored)
    return picture.of_values(smallest(_grey(picture.values_V, frame.stream, groups, number, shown)))


def _grey(stored: npt.NDArray[Any], stream: Codestream | None, groups: Groups, number: int, shown: Shown) -> Grey:
    """Return the grey values that a frame's stored values stand for, in their order."""
    header = groups.header
    values = significant_bits(stored, header, stream)
    padded = _padding(values, header) | _padding(stored, header)  # against the standard it may lie beyond the stored bits
    modality = groups.element(number, "PixelValueTransformationSequence", MODALITY_TAGS)
    voi = groups.element(number, "FrameVOILUTSequence", VOI_TAGS)
    grey, limits, top = _voi(_modality(values, modality), voi, lambda: min(_ends(header, modality)) < 0.0)
    if text(header, "PhotometricInterpretation").upper() == "MONOCHROME1":
        if shown.turning_point is None:
            shown.turning_point = _turning_point(header, modality)
        turning_point = shown.turning_point if top is None else top
        grey = turning_point - grey.astype(np.float64)
        limits = (turning_point - limits[1], turning_point - limits[0])
    shown.add(*limits)
    if bool(padded.any()) and not bool(padded.all()):
        grey = np.where(padded, grey[~padded].min(), grey)
    return np.ascontiguousarray(grey, dtype=np.float32)


def _modality(values: npt.NDArray[Any], modality: Header) -> npt.NDArray[Any]:
    """Return values after the modality transform; a slope of 0 or nothing counts as not given."""
    if isinstance(modality, Dataset) and sequence(modality, "ModalityLUTSequence"):
        table = sequence(modality, "ModalityLUTSequence")[0]
        signed = integer(modality, "PixelRepresentation") == 1
        return looked_up(values, table.LUTDescriptor, table.LUTData, little=_is_little(modality), signed=signed)
    for name in ("RescaleSlope", "RescaleIntercept"):
        if written(modality, name) and numbers(modality, name, 1) is None:
            raise Refusal(118, f"{name} is not one number")
    slope, intercept = numeric(modality, "RescaleSlope") or 1.0, numeric(modality, "RescaleIntercept")
    return values if (slope, intercept) == (1.0, 0.0) else values * slope + intercept


def _is_little(header: Dataset) -> bool:
    return bool(header.file_meta.TransferSyntaxUID != ExplicitVRBigEndian)


def _voi(
    grey: npt.NDArray[Any], voi: Header, signed: Callable[[], bool]
) -> tuple[npt.NDArray[Any], tuple[float, float], float | None]:
    """Return values after a VOI transform that bends, the range that a linear one lets through, and where the scale ends.

    The end is None where the values keep their scale; `signed` says whether values can be below zero.
    """
    everything = (-np.inf, np.inf)
    if isinstance(voi, Dataset) and sequence(voi, "VOILUTSequence"):
        table = sequence(voi, "VOILUTSequence")[0]
        whole, little = np.rint(grey).astype(np.int64), _is_little(voi)
        shown = looked_up(whole, table.LUTDescriptor, table.LUTData, little=little, signed=signed())
        return shown, everything, 2.0 ** int(table.LUTDescriptor[2]) - 1.0
    centre, width = first_number(voi, "WindowCenter"), first_number(voi, "WindowWidth")
    function = text(voi, "VOILUTFunction").upper() or "LINEAR"
    least = 1.0 if function == "LINEAR" else 0.0
    if centre is None or width is None or width <= least:
        return grey, everything, None
    if function == "SIGMOID":
        return 1.0 / (1.0 + np.exp(-4.0 * (grey - centre) / width)), everything, 1.0
    if function == "LINEAR_EXACT":
        return grey, (centre - width / 2.0, centre + width / 2.0), None
    return grey, (centre - 0.5 - (width - 1.0) / 2.0, centre - 0.5 + (width - 1.0) / 2.0), None


def _turning_point(header: Header, modality: Header) -> float:
    """Return the sum of the least and the greatest value that the stored bits can give after the modality transform.

    It is 0 where these are so large that single values would be lost beside them.
    """
    bits = integer(header, "BitsStored") or integer(header, "BitsAllocated")
    return 0.0 if bits > 16 else sum(_ends(header, modality))


def _ends(header: Header, modality: Header) -> list[float]:
    """Return what the modality transform makes of the least and of the greatest value that the stored bits can give."""
    bits = min(integer(header, "BitsStored") or integer(header, "BitsAllocated"), 32)
    signed = integer(header, "PixelRepresentation") == 1
    ends = [-(1 << (bits - 1)), (1 << (bits - 1)) - 1] if signed else [0, (1 << bits) - 1]
    return [float(end) for end in _modality(np.asarray(ends, dtype=np.int64), modality)]


def _padding(values: npt.NDArray[Any], header: Header) -> npt.NDArray[np.bool_]:
    """Return which pixels the header says to be padding."""
    if numbers(header, "PixelPaddingValue", 1) is None:
        return np.zeros(values.shape, dtype=np.bool_)
    names = ("PixelPaddingValue", "PixelPaddingRangeLimit")
    ends = [numeric(header, name) for name in names if numbers(header, name, 1)]  # an empty limit is not a limit of 0
    if values.dtype.kind in "iu":  # often written with the other sign
        span = 1 << integer(header, "BitsAllocated")
        least = -span // 2 if values.dtype.kind == "i" else 0
        ends = [(end - least) % span + least for end in ends]
    return np.asarray((values >= min(ends)) & (values <= max(ends)))


def _luminance(colour_HW3: npt.NDArray[Any]) -> Grey:
    if bool((colour_HW3 == colour_HW3[..., :1]).all()):
        return np.ascontiguousarray(colour_HW3[..., 0], dtype=np.float32)
    return np.asarray(colour_HW3.astype(np.float32) @ np.asarray(LUMINANCE, dtype=np.float32))

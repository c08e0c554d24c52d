"""Stored pixels of a DICOM object, frame by frame: what can be told before a decoder sees them, and the decoders of pydicom."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from pydicom.datadict import keyword_for_tag
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.pixels import get_decoder
from pydicom.pixels.utils import as_pixel_options, get_expected_length
from pydicom.tag import Tag
from pydicom.uid import (
    JPEG2000,
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    JPEG2000TransferSyntaxes,
    JPEGLossless,
    RLELossless,
)

from icmoe.data.ingest.codestreams import Codestream, codestream_of
from icmoe.data.ingest.encapsulated import encoded_frames
from icmoe.data.ingest.headers import Header, integer, named, numbers, text
from icmoe.data.ingest.opening import open_dicom
from icmoe.data.ingest.refusals import Refusal, refusing

UNDECODABLE = "pixels are cut short, damaged, or compressed in a way that no installed decoder reads"
UNNAMED = "pixels are compressed, and the transfer syntax is missing or one of plain pixels"
WHOLE_BYTES = 2**26
"""Largest file that is read in one go."""
NO_PIXELS = "the file holds no pixels, as in an export of headers alone"
NO_COLOURS = "it has several values per pixel, and its header does not say that they are colours of a kind that is read"
COLOURS = frozenset({"RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT"})
"""Kinds of three values per pixel; retired ones (HSV, CMYK, YBR_PARTIAL_422) would pass for red, green and blue."""
UNDEFINED = 2**32 - 1
PLAIN_ITEMS = UID("1.2.840.10008.1.2.1.98")
"""Transfer syntax of plain pixels with each frame in an item of its own, so that an object may be larger than 4 GiB."""
KEYWORDS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
OF_ALL = ("SamplesPerPixel", "BitsAllocated")
OF_WHOLE = (*OF_ALL, "BitsStored", "PixelRepresentation")
"""What a header has to say of any pixels, and of whole numbers."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One decoded frame.

    Parameters
    ----------
    pixels
        Height x width, or with three colours.
    stream
        What it was decoded from; None for plain pixels and run lengths, which are as deep as BitsAllocated.
    """

    pixels: npt.NDArray[Any]
    stream: Codestream | None = None


@contextmanager
def opened(path: Path) -> Iterator[tuple[Dataset, Callable[[int], Frame] | Refusal]]:
    """Open an object that has pixels; a large one is read frame by frame from disk, so that memory does not grow with it.

    Yields
    ------
    tuple[Dataset, Callable[[int], Frame] | Refusal]
        The header, and what returns a frame by its number, to be asked in rising order and within `refusing`; or why nothing
        does.

    Raises
    ------
    Refusal
        116 or 117 where the header cannot be read.
    """
    with refusing(117, "file cannot be opened"):
        large = path.stat().st_size > WHOLE_BYTES
    header = open_dicom(path, pixels=not large)
    if large and header.file_meta.TransferSyntaxUID == DeflatedExplicitVRLittleEndian:
        header, large = open_dicom(path, pixels=True), False  # its frames lie nowhere in the file
    with path.open("rb") if large else nullcontext() as file:
        try:
            with refusing(118, UNDECODABLE):
                found: Callable[[int], Frame] | Refusal = _reading(header, file)
        except Refusal as refusal:
            found = refusal
        yield header, found


def _reading(header: Dataset, file: BinaryIO | None) -> Callable[[int], Frame]:
    """Return what returns the frames of an object by their numbers."""
    syntax = header.file_meta.TransferSyntaxUID
    source, length, keyword, kind = _held(header) if file is None else _lying(header, file)
    names = {"pixel_keyword": keyword, "pixel_vr": kind, "photometric_interpretation": _described(header, keyword)}
    options = as_pixel_options(header, correct_unused_bits=False, **names)  # bits are corrected here
    if syntax.is_encapsulated:
        return _compressed(header, source, options)
    if length == UNDEFINED:
        raise Refusal(118, UNNAMED)
    if length // 2 >= max(2, get_expected_length(header)):  # a single byte is padded to two
        raise Refusal(118, "pixels are at least twice as long as the header says")
    if integer(header, "BitsAllocated") == 1:
        swapped = is_swapped(header, kind)
        return lambda number: Frame(unpacked(header, source, number, swapped=swapped))
    decoder, is_deep = get_decoder(syntax), _is_deep(header)
    return lambda number: Frame(_brightness(decoder.as_array(source, index=number, raw=is_deep, **options)[0], is_deep))


def _described(header: Dataset, keyword: str) -> str:
    """Return what kind of picture pixels are, in capitals, or refuse those of which the header does not say enough."""
    kind = text(header, "PhotometricInterpretation").upper()
    lacking = [name for name in (OF_WHOLE if keyword == "PixelData" else OF_ALL) if numbers(header, name, 1) is None]
    lacking += [] if kind else ["PhotometricInterpretation"]
    if lacking:
        raise Refusal(118, f"its header lacks {', '.join(lacking)}, without which no pixel can be read")
    if integer(header, "SamplesPerPixel") > 1 and kind not in COLOURS:
        raise Refusal(118, NO_COLOURS)
    return kind


def _held(header: Dataset) -> tuple[bytes, int, str, str]:
    """Return the pixels of an object in memory, their length in the file, and the keyword and kind of their element."""
    keywords = named(header, KEYWORDS)
    if not keywords:
        raise Refusal(118, NO_PIXELS)
    (keyword,) = keywords
    element = header[keyword]
    return element.value, UNDEFINED if element.is_undefined_length else len(element.value), keyword, element.VR


def _lying(header: Dataset, file: BinaryIO) -> tuple[BinaryIO, int, str, str]:
    """Return the same of an object in a file, gone to its first pixel."""
    order: Any = "little" if header.file_meta.TransferSyntaxUID.is_little_endian else "big"
    file.seek(int(header.read_to_byte))
    head = file.read(8)
    explicit = head[4:5] == b"O"  # OB, OW, OF, OD; as a length it would be odd
    length = int.from_bytes(file.read(4) if explicit else head[4:], order)
    keyword = keyword_for_tag(Tag(int.from_bytes(head[:2], order), int.from_bytes(head[2:4], order)))
    if keyword not in KEYWORDS:
        raise Refusal(118, UNDECODABLE)
    return file, length, keyword, head[4:6].decode("ascii") if explicit else "OW"


def _compressed(header: Dataset, source: bytes | BinaryIO, options: dict[str, Any]) -> Callable[[int], Frame]:
    """Return what decodes the compressed frames of an object; each has to be of the size that the header says."""
    syntax, tables, is_deep = header.file_meta.TransferSyntaxUID, options.pop("extended_offsets", None), _is_deep(header)
    frames = enumerate(encoded_frames(source, options["number_of_frames"], tables))
    options["number_of_frames"] = 1

    def read(number: int) -> Frame:
        encoded = next((frame for at, frame in frames if at == number), b"")
        if syntax == PLAIN_ITEMS:
            pixels = get_decoder(ExplicitVRLittleEndian).as_array(encoded, index=0, raw=is_deep, **options)[0]
            return Frame(_brightness(pixels, is_deep))
        stream = sized(encoded, header)
        deep, own = is_deep and not (stream and stream.mixed), options | _told_by(encoded, stream, header)
        pixels = get_decoder(_coded_as(encoded, syntax)).as_array(encapsulate([encoded]), index=0, raw=deep, **own)[0]
        return Frame(_brightness(pixels, deep), stream)

    return read


def _coded_as(encoded: bytes, syntax: UID) -> UID:
    """Return how a frame is coded: JPEG or JPEG 2000, as it begins, whichever of the two its transfer syntax names.

    Decoders that know both would give other values under the wrong name.
    """
    is_jpeg = encoded.startswith(b"\xff\xd8")
    if syntax == RLELossless or is_jpeg != (syntax in JPEG2000TransferSyntaxes):
        return syntax
    return JPEGLossless if is_jpeg else JPEG2000


def _told_by(encoded: bytes, stream: Codestream | None, header: Dataset) -> dict[str, Any]:
    """Return what a frame knows better than the header about what a decoder gives.

    JPEG of at most 8 bits comes in bytes, whatever is allocated, and of mixed colours come red, green and blue.
    """
    if stream is None:
        return {}
    in_bytes = encoded.startswith(b"\xff\xd8") and stream.precision <= 8
    depth = {"bits_allocated": 8, "bits_stored": min(8, integer(header, "BitsStored"))} if in_bytes else {}
    return depth | ({"photometric_interpretation": "RGB"} if stream.mixed else {})


def _is_deep(header: Dataset) -> bool:
    """Return whether pixels are brightness and two colour differences deeper than pydicom turns into colours."""
    return text(header, "PhotometricInterpretation").upper() == "YBR_FULL" and integer(header, "BitsAllocated") > 8


def _brightness(pixels: npt.NDArray[Any], is_deep: bool) -> npt.NDArray[Any]:  # noqa: FBT001  # as `_is_deep` says
    """Return the first of three channels in place of each where they are no colours: it is their luminance."""
    return np.repeat(pixels[..., :1], 3, axis=-1) if is_deep and pixels.ndim == 3 else pixels


def sized(encoded: bytes, header: Dataset) -> Codestream | None:
    """Return what a compressed frame says of itself, None for run lengths, which a decoder holds against the header.

    Parameters
    ----------
    encoded
        The frame.
    header
        Names the transfer syntax, Rows, Columns and BitsAllocated.

    Raises
    ------
    Refusal
        118 where the frame says nothing, or another size or more bits than the header: no decoder shall make room for it.
    """
    if header.file_meta.TransferSyntaxUID == RLELossless:
        return None
    if (stream := codestream_of(encoded)) is None:
        raise Refusal(118, UNDECODABLE)
    rows, columns, depth = (integer(header, name) for name in ("Rows", "Columns", "BitsAllocated"))
    if (stream.rows, stream.columns) != (rows, columns) or stream.precision > depth:
        found = f"{stream.rows} x {stream.columns} pixels of {stream.precision} bits"
        raise Refusal(118, f"a compressed frame is of {found}, its header says {rows} x {columns} of {depth}")
    return stream


def is_swapped(header: Dataset, kind: str) -> bool:
    """Return whether pixels of at most 8 bits are stored as words whose first byte comes second, by the VR of their element."""
    return bool(header.file_meta.TransferSyntaxUID == ExplicitVRBigEndian and kind == "OW")


def unpacked(header: Dataset, source: bytes | BinaryIO, number: int, *, swapped: bool = False) -> npt.NDArray[np.uint8]:
    """Return one frame of single bits, which need not begin with a byte.

    Parameters
    ----------
    header
        Names Rows and Columns.
    source
        The pixels, or a file at the first of them, where it is again afterwards.
    number
        Frame number from 0.
    swapped
        As `is_swapped` says.
    """
    shape = integer(header, "Rows"), integer(header, "Columns")
    size = shape[0] * shape[1]
    first, bit = divmod(number * size, 16)
    count = 2 * ((bit + size + 15) // 16)  # whole words, the last of which a padding byte may complete
    if isinstance(source, bytes):
        packed = source[2 * first : 2 * first + count]
    else:
        start = source.tell()
        source.seek(2 * first, io.SEEK_CUR)
        packed = source.read(count)
        source.seek(start)
    stored = np.frombuffer(packed, np.uint8)
    stored = stored[: len(stored) // 2 * 2].reshape(-1, 2)[:, ::-1].ravel() if swapped else stored
    bits = np.unpackbits(stored, bitorder="little")
    return bits[bit : bit + size].reshape(shape)


def significant_bits(stored: npt.NDArray[Any], header: Header, stream: Codestream | None = None) -> npt.NDArray[Any]:
    """Return integers without what lies above their stored bits: overlays in old files, or a sign not extended.

    Parameters
    ----------
    stored
        Decoded pixels, any integer type.
    header
        Names BitsStored, HighBit and PixelRepresentation.
    stream
        What they were decoded from: it may hold the stored bits alone, or all that are allocated.
    """
    depth, bits = stored.dtype.itemsize * 8, integer(header, "BitsStored")
    shift, held = integer(header, "HighBit") + 1 - bits, stream.precision if stream else depth
    signed = integer(header, "PixelRepresentation") == 1
    if stored.dtype.kind not in "iu" or not 1 < bits < depth:
        return stored
    if 0 < shift <= held - bits:
        stored = stored >> shift
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
    if low <= int(stored.min()) and int(stored.max()) <= high:
        return stored
    if stream is not None and stream.lossy and not signed:
        return np.asarray(np.minimum(stored, high))  # white that overshoots must not wrap round to black
    kept = stored.astype(np.int64) & ((1 << bits) - 1)
    return np.asarray(np.where(kept > high, kept - (1 << bits), kept)) if signed else kept

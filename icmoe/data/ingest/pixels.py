"""Stored DICOM pixels to grey values: what the standard says between the file and the screen, in its order.

Sign and depth, colour to luminance, padding, modality transform, VOI transform (the first window only clips, so that a
picture keeps its scale), MONOCHROME1 turned round (PS3.3 C.7.6.3, C.11.1, C.11.2). Decoders are pydicom's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset
from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi, iter_pixels

from icmoe.data.images import LUMINANCE
from icmoe.data.ingest.headers import integer, numbers, numeric, sequence, text
from icmoe.data.ingest.opening import Refusal, open_dicom, refusing

MODALITY_TAGS = ("RescaleSlope", "RescaleIntercept", "RescaleType", "ModalityLUTSequence")
VOI_TAGS = ("WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence")
UNDECODABLE = "pixels are cut short, damaged, or compressed in a way that no installed decoder reads"
WHOLE_BYTES = 2**26
"""Largest file that is read in one go."""
Grey = npt.NDArray[np.float32]


def read_frames(path: Path, numbers_wanted: Sequence[int]) -> Iterator[tuple[int, Grey | Refusal]]:
    """Yield the wanted frames of one object in rising order, each as grey values or as the reason why it has none.

    A large multi-frame object is read frame by frame from disk, so that memory does not grow with it.

    Parameters
    ----------
    path
        DICOM file with pixels.
    numbers_wanted
        Frame numbers from 0.

    Raises
    ------
    Refusal
        116 or 117 where the header cannot be read.
    """
    large = path.stat().st_size > WHOLE_BYTES
    header = open_dicom(path, pixels=not large)
    wanted = sorted(set(numbers_wanted)) if integer(header, "NumberOfFrames") > 1 else [0]
    stream = iter_pixels(path if large else header, indices=wanted)
    for place, number in enumerate(wanted):
        try:
            with refusing(118, UNDECODABLE):
                stored = next(stream)
                grey = _grey(stored, header, number)
            yield number, grey
        except Refusal as refusal:
            for rest in wanted[place:]:
                yield rest, refusal
            return


def _grey(stored: npt.NDArray[Any], header: Dataset, number: int) -> Grey:
    """Return the grey values of one decoded frame, H x W."""
    photometric = text(header, "PhotometricInterpretation").upper()
    if photometric == "PALETTE COLOR":
        stored = apply_color_lut(stored, header)
    if stored.ndim == 3:
        return _luminance(stored[..., :3])
    if stored.ndim != 2:
        raise Refusal(118, f"a frame of {stored.ndim} dimensions")
    values = significant_bits(stored, header)
    padded = _padding(values, header)
    modality = frame_element(header, number, "PixelValueTransformationSequence", MODALITY_TAGS)
    grey: npt.NDArray[Any] = apply_modality_lut(values, modality)
    voi = frame_element(header, number, "FrameVOILUTSequence", VOI_TAGS)
    grey, limits = _voi(grey, voi)
    if photometric == "MONOCHROME1":
        low, high = limits or _range(header, modality)
        grey = low + high - grey.astype(np.float64)
    if padded is not None and bool(padded.any()) and not bool(padded.all()):
        grey = np.where(padded, grey[~padded].min(), grey)
    return np.ascontiguousarray(grey, dtype=np.float32)


def significant_bits(stored: npt.NDArray[Any], header: Dataset) -> npt.NDArray[Any]:
    """Return integers without what lies above their stored bits: overlays in old files, or a sign not extended.

    Parameters
    ----------
    stored
        Decoded pixels, any integer type.
    header
        Names BitsStored, HighBit and PixelRepresentation.
    """
    depth, bits = stored.dtype.itemsize * 8, integer(header, "BitsStored")
    shift = integer(header, "HighBit") + 1 - bits
    if stored.dtype.kind not in "iu" or not 1 < bits < depth or header.file_meta.TransferSyntaxUID.is_encapsulated:
        return stored
    if 0 < shift <= depth - bits:
        stored = stored >> shift
    signed = integer(header, "PixelRepresentation") == 1
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
    if low <= int(stored.min()) and int(stored.max()) <= high:
        return stored
    kept = stored.astype(np.int64) & ((1 << bits) - 1)
    return np.where(kept > high, kept - (1 << bits), kept) if signed else kept


def frame_element(header: Dataset, number: int, group: str, names: Sequence[str]) -> Dataset:
    """Return the elements `names` that hold for a frame: its own group's, the shared group's, or the object's.

    Parameters
    ----------
    header
        The object.
    number
        Frame number from 0.
    group
        Functional group that holds them in an enhanced object.
    names
        Keywords; those with a value of another form are left out.
    """
    own = sequence(header, "PerFrameFunctionalGroupsSequence")[number : number + 1]
    shared = sequence(header, "SharedFunctionalGroupsSequence")[:1]
    places = [item for place in (*own, *shared) for item in sequence(place, group)[:1]]
    source = places[0] if places else header
    found = Dataset()
    for name in names:
        if name in source and (name.endswith("Sequence") or text(source, name)):
            found[name] = source[name]
    return found


def _voi(grey: npt.NDArray[Any], voi: Dataset) -> tuple[npt.NDArray[Any], tuple[float, float] | None]:
    """Return values after the VOI transform and the range it leaves, None where it changed nothing."""
    if sequence(voi, "VOILUTSequence"):
        shown = apply_voi(grey.astype(np.int64), voi, index=0)
        return shown, (0.0, float(2 ** integer(sequence(voi, "VOILUTSequence")[0], "BitsStored") or shown.max()))
    centre, width = first_number(voi, "WindowCenter"), first_number(voi, "WindowWidth")
    function = text(voi, "VOILUTFunction").upper() or "LINEAR"
    least = 1.0 if function == "LINEAR" else 0.0
    if centre is None or width is None or width <= least:
        return grey, None
    if function == "SIGMOID":
        return 1.0 / (1.0 + np.exp(-4.0 * (grey - centre) / width)), (0.0, 1.0)
    if function == "LINEAR_EXACT":
        limits = (centre - width / 2.0, centre + width / 2.0)
    else:
        limits = (centre - 0.5 - (width - 1.0) / 2.0, centre - 0.5 + (width - 1.0) / 2.0)
    return np.clip(grey, *limits), limits


def first_number(data: Dataset, name: str) -> float | None:
    """Return the first of one or several numbers, None where there is none."""
    for count in range(1, 9):
        values = numbers(data, name, count)
        if values:
            return values[0]
    return None


def _range(header: Dataset, modality: Dataset) -> tuple[float, float]:
    """Return the least and greatest value that the stored bits can give after the modality transform."""
    bits = integer(header, "BitsStored") or integer(header, "BitsAllocated")
    signed = integer(header, "PixelRepresentation") == 1
    stored = np.asarray([[-(1 << (bits - 1)), (1 << (bits - 1)) - 1] if signed else [0, (1 << bits) - 1]], dtype=np.int64)
    low, high = np.sort(apply_modality_lut(stored, modality).ravel().astype(np.float64))
    return float(low), float(high)


def _padding(values: npt.NDArray[Any], header: Dataset) -> npt.NDArray[np.bool_] | None:
    """Return which pixels the header says to be padding, None where it names no padding value."""
    if "PixelPaddingValue" not in header:
        return None
    one = numeric(header, "PixelPaddingValue")
    other = numeric(header, "PixelPaddingRangeLimit") if "PixelPaddingRangeLimit" in header else one
    return np.asarray((values >= min(one, other)) & (values <= max(one, other)))


def _luminance(colour_HW3: npt.NDArray[Any]) -> Grey:
    if bool((colour_HW3 == colour_HW3[..., :1]).all()):
        return np.ascontiguousarray(colour_HW3[..., 0], dtype=np.float32)
    return np.asarray(colour_HW3.astype(np.float32) @ np.asarray(LUMINANCE, dtype=np.float32))

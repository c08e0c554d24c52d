"""DICOM SEG objects, their segments checked by highdicom: binary, fractional (from half of the maximum on) and label maps."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.pixels import pixel_array
from pydicom.uid import UncompressedTransferSyntaxes

from icmoe.data.ingest.encapsulated import encoded_frames, right_offsets
from icmoe.data.ingest.geometry import Grid, share_within
from icmoe.data.ingest.headers import (
    EMPTY,
    group_of,
    group_plane,
    identity,
    integer,
    named_patient,
    numbers,
    numeric,
    referenced_frames,
    sequence,
    text,
)
from icmoe.data.ingest.labels import LabelNames
from icmoe.data.ingest.opening import Refusal, open_dicom, refusing
from icmoe.data.ingest.pseudonyms import Pseudonyms
from icmoe.data.ingest.records import FileRecord, Patch, Plane
from icmoe.data.ingest.refusals import OFF_IMAGE
from icmoe.data.ingest.stored import is_swapped, sized, unpacked

BROKEN = "segmentation object does not follow the standard"
KIND = "SegmentedPropertyTypeCodeSequence"
REQUIRED = frozenset({"SegmentNumber", "SegmentLabel", "SegmentAlgorithmType", "SegmentedPropertyCategoryCodeSequence", KIND})
"""Of every segment."""
CODES = REQUIRED | {"AnatomicRegionSequence", "PrimaryAnatomicStructureSequence"}
"""Where a plain segment has codes, if anywhere."""
LABEL_MAP = "1.2.840.10008.5.1.4.1.1.66.7"
DEFLATED_FRAMES = "1.2.840.10008.1.2.8.1"
"""Deflated Image Frame Compression, which no library here knows; the standard has it for segmentations above all."""
CODE_VALUES = frozenset({"CodeValue", "LongCodeValue", "URNCodeValue"})


def record(path: Path, header: Dataset, names: LabelNames, hashes: Pseudonyms) -> FileRecord:
    """Return the record of a SEG object.

    Parameters
    ----------
    path
        The file.
    header
        Not used: it lacks what a segment is.
    names
        What segments may be called.
    hashes
        Of the site.

    Raises
    ------
    Refusal
        116 or 117, also where frames do not say which segment they show, or two have one number; 120 where none names a class
        of the study.
    """
    del header
    seg = open_dicom(path, pixels=False)
    with refusing(117, BROKEN):
        for item in seg.SegmentSequence:
            if not is_plain(item):
                _check(item)
        numbered = [(int(item.SegmentNumber), item) for item in seg.SegmentSequence]
        if len(dict(numbered)) < len(numbered):
            raise Refusal(117, "two segments have one number: whose marks are whose, nobody knows")
        labels = {number: names.index(_names_of(item)) for number, item in numbered}
        if labels.pop(0, None):
            raise Refusal(117, "a class of the study has segment number 0, which marks nothing")
        if not any(label is not None for label in labels.values()):
            raise Refusal(120, f"no segment is called like a class of the study (it has {len(labels)})")
        known = {number: label for number, label in labels.items() if label is not None}
        groups, shared = _groups(seg)
        _require_described(seg, groups, shared, {number for number, _ in numbered})
        listed = tuple(sorted(set(listed_instances(seg, hashes))))
        return FileRecord(
            kind="seg",
            modality="SEG",
            rows=int(seg.Rows),
            columns=int(seg.Columns),
            patches=tuple(_patches(seg, groups, shared, known, hashes)),
            listed=listed,
            listed_series=() if listed else tuple(sorted(hashes.of("uid", uid) for uid in _listed_series(seg))),
            step_mm=_step_mm(groups, shared),
            **(identity(seg, hashes) | named_patient(seg, hashes)),
        )


def opened(path: Path) -> Dataset:
    """Return the object with its pixels.

    Raises
    ------
    Refusal
        116 or 117; 118 where its pixels are of another depth than it says, each frame of bits begins with a byte of its own, or
        a wrong table of offsets leaves open where compressed ones begin.
    """
    seg = open_dicom(path, pixels=True)
    if seg.file_meta.TransferSyntaxUID in UncompressedTransferSyntaxes:
        _require_length(seg)
    else:
        with refusing(118, "frames of the segmentation cannot be told apart"):
            _mend_table(seg)
    return seg


def _mend_table(seg: Dataset) -> None:
    """Replace a table of offsets that names places where no frame begins: marks would lie on other slices."""
    count, told = integer(seg, "NumberOfFrames") or 1, None
    if "ExtendedOffsetTable" in seg and "ExtendedOffsetTableLengths" in seg:
        told = seg.ExtendedOffsetTable, seg.ExtendedOffsetTableLengths
    if right_offsets(seg.PixelData, count, told):
        seg.PixelData = encapsulate([*encoded_frames(seg.PixelData, count, told)])
        if told:
            del seg.ExtendedOffsetTable, seg.ExtendedOffsetTableLengths


def _require_length(seg: Dataset) -> None:
    """Refuse plain pixels whose length tells that frames lie elsewhere than in the standard; later ones would be shifted.

    Where pixels are too few, rows or columns may be wrong as well as the end be lost.
    """
    count, depth = integer(seg, "NumberOfFrames") or 1, integer(seg, "BitsAllocated")
    bits, found = integer(seg, "Rows") * integer(seg, "Columns") * depth, len(seg.get("PixelData") or b"")
    want, apart = (count * bits + 7) // 8, count * ((bits + 7) // 8)
    if found < want:
        raise Refusal(118, f"pixels of the segmentation are shorter than the {want} bytes that its header says")
    if found >= 2 * max(2, want):  # a single byte is padded to two
        raise Refusal(118, "pixels of the segmentation are at least twice as long as its header says")
    if found == apart + apart % 2 > want + want % 2:
        raise Refusal(118, "frames of the segmentation begin with a byte each, where the standard packs them without a gap")


def draw(
    seg: Dataset, patches: Sequence[Patch], grids: Sequence[Grid | None], plane: Plane | None, shape: tuple[int, int]
) -> npt.NDArray[np.uint8]:
    """Return the class of every pixel of an image.

    Parameters
    ----------
    seg
        From `opened`.
    patches
        That belong to the image.
    grids
        Where the pixels of each lie; None for pixel by pixel.
    plane
        Not used: the grids know.
    shape
        Height and width, pixels.

    Raises
    ------
    Refusal
        118 where a frame cannot be decoded, 121 where most of it lies off the image, 106 for an unknown value of a label map.
    """
    del plane
    classes = np.zeros(shape, dtype=np.uint8)
    for patch, grid in zip(patches, grids, strict=True):
        marked = read_patch(seg, patch)
        if grid is not None and share_within(marked[..., None], [grid], shape) < 0.5:
            raise Refusal(121, OFF_IMAGE)
        placed = marked if grid is None else grid.take(marked[..., None], shape)
        classes[placed] = np.maximum(classes[placed], patch.label)
    return classes


def read_patch(seg: Dataset, patch: Patch) -> npt.NDArray[np.bool_]:
    """Return which pixels one frame of a SEG object marks, H x W.

    Parameters
    ----------
    seg
        The object with its pixels; that it follows the standard was found out when its record was made.
    patch
        Of that record.

    Raises
    ------
    Refusal
        118 where the frame cannot be decoded or is of another size than the object says, 106 where a label map holds a value
        that no segment describes, a fractional object one beyond its whole, or any other more than one beside 0.
    """
    with refusing(118, "frame of the segmentation cannot be decoded"):
        frame = _frame(seg, patch.number)
        if patch.value:
            _require_known(frame, seg)
            return np.asarray(frame == patch.value)
        if frame.dtype == np.bool_:
            return frame
        whole = integer(seg, "MaximumFractionalValue") if text(seg, "SegmentationType") == "FRACTIONAL" else 0
        _require_shares(frame, whole)
        return np.asarray(2.0 * frame.astype(np.float64) >= whole) if whole else np.asarray(frame > 0)


def _frame(seg: Dataset, number: int) -> npt.NDArray[Any]:
    """Return the stored values of a frame, H x W; single bits as they mark."""
    source, at, is_plain = seg.PixelData, number, seg.file_meta.TransferSyntaxUID in UncompressedTransferSyntaxes
    if not is_plain:
        encoded = get_frame(source, number, number_of_frames=integer(seg, "NumberOfFrames") or 1)
        if seg.file_meta.TransferSyntaxUID != DEFLATED_FRAMES:
            sized(encoded, seg)
            return pixel_array(seg, index=number)
        source, at = _inflated(encoded, seg), 0
    if integer(seg, "BitsAllocated") == 1:
        return unpacked(seg, source, at, swapped=is_plain and is_swapped(seg, seg["PixelData"].VR)).view(np.bool_)
    if is_plain:
        return pixel_array(seg, index=number)
    return np.frombuffer(source, f"<u{integer(seg, 'BitsAllocated') // 8}").reshape(integer(seg, "Rows"), -1)


def _inflated(encoded: bytes, seg: Dataset) -> bytes:
    """Return the bytes of a frame that was deflated by itself (PS3.5 A.4); no more are made room for than it may have."""
    size = (integer(seg, "Rows") * integer(seg, "Columns") * integer(seg, "BitsAllocated") + 7) // 8
    found = zlib.decompressobj(wbits=-zlib.MAX_WBITS).decompress(encoded, size + 2)
    if not size <= len(found) <= size + size % 2:
        raise Refusal(118, f"a deflated frame of the segmentation does not hold the {size} bytes that its header says")
    return found[:size]


def _require_shares(frame_HW: npt.NDArray[Any], whole: int) -> None:
    """Refuse a frame with values beyond the whole, or with several where nothing is said to be shares (`whole` 0).

    Both come of a header that is not that of the pixels; half of a wrong whole marks too much or nothing.
    """
    marks = frame_HW[frame_HW > 0]
    if marks.size and int(marks.max()) > (whole or int(marks.min())):
        said = f"its largest is said to be {whole}" if whole else "it is said to be binary"
        raise Refusal(106, f"mask cannot be used: value {int(marks.max())}, though {said}")


def _require_known(frame_HW: npt.NDArray[Any], seg: Dataset) -> None:
    """Refuse a frame of a label map with values that no segment describes: what they mark would become background."""
    background = [0, *(integer(seg, name) for name in ("PixelPaddingValue",) if name in seg)]
    described = {int(item.SegmentNumber) for item in seg.SegmentSequence}
    unknown = sorted(set(np.unique(frame_HW).tolist()).difference(described, background))
    if unknown:
        raise Refusal(106, f"mask cannot be used: no segment describes value {', '.join(map(str, unknown[:5]))}")


def listed_instances(data: Dataset, hashes: Pseudonyms) -> Iterable[str]:
    """Yield the hashes of the instances that a mask names as its images."""
    for series in _referenced_series(data):
        for item in sequence(series, "ReferencedInstanceSequence"):
            yield hashes.of("uid", text(item, "ReferencedSOPInstanceUID"))


def _listed_series(data: Dataset) -> set[str]:
    return {text(series, "SeriesInstanceUID") for series in _referenced_series(data)} - {""}


def _referenced_series(data: Dataset) -> Iterable[Dataset]:
    """Yield the series that a mask refers to; those of another study have a sequence of their own (PS3.3 C.12.2)."""
    for place in (data, *sequence(data, "StudiesContainingOtherReferencedInstancesSequence")):
        yield from sequence(place, "ReferencedSeriesSequence")


def is_plain(segment: Dataset) -> bool:
    """Return whether a segment has all that one must have, and nothing that its check would have to look into.

    It needs no other check then: that by highdicom's tables begins with a third of a second for each process.
    """
    try:
        nested = {element.keyword for element in segment if element.VR == "SQ"}
        codes = [code for name in nested for code in segment[name].value]
        return (
            all(name in segment for name in REQUIRED)
            and nested <= CODES
            and bool(segment.SegmentedPropertyCategoryCodeSequence and segment[KIND].value)
            and all(map(_is_plain_code, codes))
        )
    except Exception:  # noqa: BLE001  # an element cannot be read; the check may not look at it
        return False


def _is_plain_code(code: Dataset) -> bool:
    called = [name for name in CODE_VALUES if name in code]
    texts = [code.get(name) for name in (*called, "CodeMeaning", "CodingSchemeDesignator")]
    return len(called) == 1 and all(isinstance(text, str) for text in texts) and all(element.VR != "SQ" for element in code)


def _check(segment: Dataset) -> None:
    """Check a segment as highdicom does; it raises whatever it likes where one does not follow the standard."""
    from highdicom.seg import SegmentDescription

    SegmentDescription.from_dataset(segment, copy=False)


def _names_of(segment: Dataset) -> list[str]:
    kind = segment[KIND].value[0]
    value = next(kind[name].value for name in ("CodeValue", "LongCodeValue", "URNCodeValue") if name in kind)
    return [str(segment.SegmentLabel), kind.CodeMeaning, value, f"{kind.CodingSchemeDesignator}:{value}"]


def _patches(
    seg: Dataset, groups: Sequence[Dataset], shared: Dataset, labels: dict[int, int], hashes: Pseudonyms
) -> Iterable[Patch]:
    whole = _kind(seg) == "LABELMAP"
    for number, own in enumerate(groups):
        segments = labels if whole else {_segment(own, shared): labels.get(_segment(own, shared))}
        plane = group_plane(own, shared)
        orientation = group_of(own, shared, "PlaneOrientationSequence")
        axes = () if plane else numbers(orientation, "ImageOrientationPatient", 6) or ()
        for image, frame in _images(own, shared, hashes) or [("", -1)]:
            for segment, label in segments.items():
                if label is not None:
                    value = segment if whole else 0
                    place = {"image": image, "frame": frame, "plane": plane, "axes": axes}
                    yield Patch(number=number, label=label, value=value, group=segment, **place)


def _require_described(seg: Dataset, groups: Sequence[Dataset], shared: Dataset, described: set[int]) -> None:
    """Refuse frames that nothing is known of: left out, they would make background of what they mark.

    Nor is anything known of shares of an unknown whole: 1 may be all of it or a 255th.
    """
    frames = integer(seg, "NumberOfFrames") or 1  # one frame of several may have been cut out with the groups of all
    if len(groups) < frames:
        raise Refusal(117, f"segmentation of {frames} frames describes {len(groups)}")
    kind = _kind(seg)
    if kind == "FRACTIONAL" and integer(seg, "BitsAllocated") > 1 and integer(seg, "MaximumFractionalValue") < 1:
        raise Refusal(117, "a fractional segmentation does not say which value is the whole")
    if not (kind == "LABELMAP" or all(_segment(own, shared) in described - {0} for own in groups)):
        raise Refusal(117, "frames of the segmentation name no segment, or one that it does not describe")


def _kind(seg: Dataset) -> str:
    """Return the type of a segmentation; that of a label map its class says too."""
    return "LABELMAP" if text(seg, "SOPClassUID") == LABEL_MAP else text(seg, "SegmentationType").upper()


def _groups(seg: Dataset) -> tuple[Sequence[Dataset], Dataset]:
    """Return what is said of each frame, and of all."""
    shared = sequence(seg, "SharedFunctionalGroupsSequence") or [EMPTY]
    return sequence(seg, "PerFrameFunctionalGroupsSequence"), shared[0]


def _step_mm(groups: Sequence[Dataset], shared: Dataset) -> float:
    """Return how far one frame is from the next or how thick it is, 0 where the object does not say."""
    measures = [item for place in (shared, *groups[:1]) for item in sequence(place, "PixelMeasuresSequence")[:1]]
    said = [numeric(item, name) for item in measures for name in ("SpacingBetweenSlices", "SliceThickness")]
    return next((value for value in said if value > 0.0), 0.0)


def _segment(own: Dataset, shared: Dataset) -> int:
    name = "SegmentIdentificationSequence"
    return integer((sequence(own, name) or sequence(shared, name) or [EMPTY])[0], "ReferencedSegmentNumber")


def _images(own: Dataset, shared: Dataset, hashes: Pseudonyms) -> list[tuple[str, int]]:
    """Return the instances and frames that one frame was derived from, each once."""
    found = []
    for derivation in sequence(own, "DerivationImageSequence") or sequence(shared, "DerivationImageSequence"):
        for source in sequence(derivation, "SourceImageSequence"):
            uid = text(source, "ReferencedSOPInstanceUID")
            if uid:
                found += [(hashes.of("uid", uid), frame) for frame in referenced_frames(source)]
    return list(dict.fromkeys(found))

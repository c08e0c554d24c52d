"""DICOM headers to records: a whitelist of tags is read, everything else is not even looked at.

Identity leaves this file as keyed hashes only. Numbers that a header gives in a wrong form count as not given.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final, cast

from pydicom.datadict import dictionary_VR
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.tag import BaseTag, Tag

from icmoe.data.ingest.folding import unnumbered
from icmoe.data.ingest.geometry import normal
from icmoe.data.ingest.opening import Refusal, open_dicom, pictureless, refusing
from icmoe.data.ingest.pseudonyms import Pseudonyms
from icmoe.data.ingest.records import MODALITIES, SAFE_MODALITIES, FileRecord, FramePlace, Plane

MAX_FRAMES = 100_000
MAX_PIXELS = 2**26
WRITTEN_INTO = {
    "1.2.840.10008.5.1.4.1.1.7": "a secondary capture",
    "1.2.840.10008.5.1.4.1.1.3": "an ultrasound picture",
    "1.2.840.10008.5.1.4.1.1.6": "an ultrasound picture",
    "1.2.840.10008.5.1.4.1.1.77.1": "a photograph",
}
"""Classes, with all below them, whose pictures often have text burned in."""
CONVERTED = frozenset({"DV", "DI", "DF", "WSD", "SD", "SI", "DRW"})
"""Conversion types of video, film, workstations, paper and drawings; all of DICOM's terms but synthetic images."""
CAPTURED = ("SCREEN", "CAPTURE", "SNAPSHOT", "REPORT", "DOSE")
"""Words in the image type of pictures of a screen and of tables as pictures."""
NO_PICTURE = {
    "1.2.840.10008.5.1.4.1.1.481.2": "a dose grid, not a picture",
    "1.2.840.10008.5.1.4.1.1.30": "a parametric map, not a picture",
    "1.2.840.10008.5.1.4.1.1.4.2": "a spectrum at each place, not a picture",
    "1.2.840.10008.5.1.4.1.1.77.1.6": "a whole-slide image of tiles",
    "1.2.840.10008.5.1.4.1.1.66.5": "a surface segmentation, not on a pixel grid",
}

PERSON = ["PatientID", "IssuerOfPatientID", "PatientName", "PatientBirthDate", "OtherPatientIDs", "OtherPatientIDsSequence"]
BELONGING = ["StudyInstanceUID", "SeriesInstanceUID", "SeriesNumber", "FrameOfReferenceUID"]
PICTURE = ["Modality", "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "BurnedInAnnotation"]
WRITING = ["RecognizableVisualFeatures", "ConversionType", "ImageType"]
PLACE = ["ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "ImagerPixelSpacing"]
PARTS = ["ConcatenationFrameOffsetNumber", "InstanceNumber"]
"""Order of the multi-frame objects of a series: how many frames of a whole lie before a part (PS3.3 C.7.6.16), their numbers."""
ORDER = ["TemporalPositionIdentifier", "TriggerTime", "AcquisitionNumber", "InstanceNumber"]
FRAMES = ["SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"]
SEGMENTS = ["SegmentSequence", "SegmentationType", "ReferencedSeriesSequence", "SourceImageSequence"]
CONTOURS = ["StructureSetROISequence", "ROIContourSequence", "RTROIObservationsSequence", "ReferencedFrameOfReferenceSequence"]
PLAIN_NUMBERS = {"IS": re.compile(rb" *[+-]?\d+ *"), "DS": re.compile(rb"(?:(?:^|\\) *[+-]?\d+(?:\.\d*)?(?:[eE][+-]?\d+)? *)+")}
GREY = ["BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "RescaleSlope", "RescaleIntercept"]
SHOWN = ["WindowCenter", "WindowWidth", "PixelPaddingValue", "PixelPaddingRangeLimit"]
MEANING = ["PhotometricInterpretation", "VOILUTFunction", "ModalityLUTSequence", "VOILUTSequence"]
DETECTORS = ["DetectorInformationSequence", "SliceVector", "SpacingBetweenSlices"]
KEYWORDS = (
    *PERSON,
    *BELONGING,
    *DETECTORS,
    *PICTURE,
    *WRITING,
    *GREY,
    *SHOWN,
    *MEANING,
    *PLACE,
    *ORDER,
    *PARTS,
    *FRAMES,
    *SEGMENTS,
    *CONTOURS,
)
TAGS = [Tag(name) for name in KEYWORDS]

EMPTY: Final = Dataset()
"""Stands for an item that is not there."""

Header = Dataset | Mapping[str, Any]
"""A data set, or values by keyword."""


def read_header(path: Path) -> Dataset:
    """Return the whitelisted part of a DICOM header.

    Raises
    ------
    Refusal
        116 or 117.
    """
    return open_dicom(path, pixels=False, tags=TAGS)


def image_record(data: Dataset, hashes: Pseudonyms) -> FileRecord:
    """Return the record of an image.

    Parameters
    ----------
    data
        From `read_header`.
    hashes
        Of the site.

    Raises
    ------
    Refusal
        119 where the object has no picture, 117 where its size is out of range.
    """
    kind = text(data, "SOPClassUID")
    for prefix, why in NO_PICTURE.items():
        if kind == prefix or kind.startswith(prefix + "."):
            raise Refusal(119, why)
    if "MOSAIC" in terms(data, "ImageType"):
        raise Refusal(119, "a mosaic of slices in one picture, whose geometry is that of none of them")
    rows, columns = integer(data, "Rows"), integer(data, "Columns")
    count = integer(data, "NumberOfFrames") or 1
    if not (rows and columns):
        raise pictureless(kind)
    if rows < 1 or columns < 1 or rows * columns > MAX_PIXELS or not 1 <= count <= MAX_FRAMES:
        raise Refusal(117, f"{rows} x {columns} pixels, {count} frames; at most {MAX_PIXELS} pixels and {MAX_FRAMES} frames")
    with refusing(117, "geometry in the header cannot be parsed"):
        frames = tuple(frame_places(data, count))
    return FileRecord(
        kind="image",
        modality=modality(data),
        rows=rows,
        columns=columns,
        frames=frames,
        held=_held(data),
        **identity(data, hashes),
    )


def identity(data: Dataset, hashes: Pseudonyms) -> dict[str, Any]:
    """Return the keyed hashes of whom and what an object belongs to.

    A patient without number is known by name and birth date, without these by the study.
    """
    study, named = text(data, "StudyInstanceUID"), name_and_birth(data)
    person = named or study
    image, space = text(data, "SOPInstanceUID"), text(data, "FrameOfReferenceUID")
    return {
        "patient": hashes.patient(person) if person else "",
        "nameless": not (named or text(data, "PatientID")),
        **{key: value for key, value in named_patient(data, hashes).items() if value},
        "pattern": hashes.of("pattern", unnumbered(text(data, "PatientID"))),
        "study": hashes.of("uid", study) if study else "",
        "series": hashes.of("uid", text(data, "SeriesInstanceUID") or image),
        "image": hashes.of("uid", image),
        "space": hashes.of("uid", space) if space else "",
    }


def name_and_birth(data: Dataset) -> str:
    """Return name, zero byte and birth date, empty without a name: its first group, of Latin letters, others and its sound."""
    name = next(filter(None, (group.strip().rstrip("^ ") for group in text(data, "PatientName").split("="))), "")
    return f"{name}\0{text(data, 'PatientBirthDate')}" if name else ""


def named_patient(data: Dataset, hashes: Pseudonyms) -> dict[str, str]:
    """Return the keyed hash of the patient's number, empty where there is none: who a mask says that it belongs to.

    Numbers are an issuer's own. Where one is named it is hashed too, as `issued` writes it, and `number` is the bare number's.
    """
    number, issuer = text(data, "PatientID"), text(data, "IssuerOfPatientID")
    bare = hashes.patient(number) if number else ""
    return {"patient": hashes.patient(issued(number, issuer)), "number": bare} if number and issuer else {"patient": bare}


def issued(number: str, issuer: str) -> str:
    """Return a patient's number with who gave it, as HL7 writes them."""
    return f"{number}^^^{issuer}"


def modality(data: Dataset) -> str:
    """Return the modality where it is one of DICOM's terms, else an empty text."""
    term = text(data, "Modality").upper()
    return term if term in MODALITIES else ""


def frame_places(data: Dataset, count: int) -> Iterable[FramePlace]:
    """Yield place and order of each frame, from functional groups where the object has them.

    Parameters
    ----------
    data
        The object's header.
    count
        Number of frames.
    """
    groups = sequence(data, "PerFrameFunctionalGroupsSequence")
    shared = (sequence(data, "SharedFunctionalGroupsSequence") or [EMPTY])[0]
    detected = _detected_planes(data, count)
    for number in range(count):
        if groups or "SharedFunctionalGroupsSequence" in data:
            own = groups[number] if number < len(groups) else EMPTY
            content = (sequence(own, "FrameContentSequence") or [EMPTY])[0]
            order: tuple[float, ...] = (
                numeric(content, "TemporalPositionIndex"),
                numeric(content, "InStackPositionNumber"),
                *(numeric(data, name) for name in PARTS),
                float(number),
            )
            yield FramePlace(plane=group_plane(own, shared), order=order)
        else:
            order = tuple(numeric(data, name) for name in ORDER)
            plane = plane_of(data, data, data) if count == 1 else None
            yield FramePlace(plane=plane or detected.get(number), order=(*order, float(number)))


def _detected_planes(data: Dataset, count: int) -> dict[int, Plane]:
    """Return the planes of a nuclear medicine object by frame, none where it does not say.

    Where its first slice lies is said of its detector (PS3.3 C.8.4.9); the others of a reconstruction follow along the normal,
    against it where the distance is negative, each as far as its slice number says (C.8.4.8, C.8.4.15).
    """
    detector = (sequence(data, "DetectorInformationSequence") or [EMPTY])[0]
    first = plane_of(detector, detector, data)
    if first is None or count == 1:
        return {0: first} if first else {}
    slices, distance_mm = all_numbers(data, "SliceVector"), numeric(data, "SpacingBetweenSlices")
    if not distance_mm or len(slices) != count or not any(term.startswith("RECON") for term in terms(data, "ImageType")):
        return {}
    step = [distance_mm * along for along in normal(first)]
    starts = [[at + (number - 1.0) * by for at, by in zip(first[:3], step, strict=True)] for number in slices]
    return {frame: cast(Plane, (*start, *first[3:])) for frame, start in enumerate(starts)}


def group_plane(own: Dataset, shared: Dataset) -> Plane | None:
    """Return the plane of a frame from its own and the shared functional groups."""
    return plane_of(*(group_of(own, shared, f"{key}Sequence") for key in ("PlanePosition", "PlaneOrientation", "PixelMeasures")))


def group_of(own: Dataset, shared: Dataset, name: str) -> Dataset:
    """Return a functional group, a frame's own before the shared one, empty where there is none."""
    return (sequence(own, name) or sequence(shared, name) or [EMPTY])[0]


def plane_of(position: Dataset, orientation: Dataset, measures: Dataset) -> Plane | None:
    """Return a plane, or None where one of its parts is missing or cannot be; unknown pixel distances are 0.

    The ratio of a pixel's sides (PixelAspectRatio) gives no distance: without one such pictures are taken as they are stored,
    as those are whose rows and columns lie at different distances.
    """
    where = numbers(position, "ImagePositionPatient", 3)
    axes = numbers(orientation, "ImageOrientationPatient", 6)
    if where is None or axes is None or max(map(abs, where)) > 1e5:
        return None
    along_row, along_column = axes[:3], axes[3:]
    if any(abs(math.hypot(*axis) - 1.0) > 0.01 for axis in (along_row, along_column)):
        return None
    if abs(sum(a * b for a, b in zip(along_row, along_column, strict=True))) > 0.01:
        return None
    known = numbers(measures, "PixelSpacing", 2) or numbers(measures, "ImagerPixelSpacing", 2) or (0.0, 0.0)
    spacing = known if all(0.0 < value < 1000.0 for value in known) else (0.0, 0.0)
    return cast(Plane, (*where, *axes, *spacing))


def sequence(data: Header, name: str) -> Sequence[Dataset]:
    """Return the items of a sequence, none where it is absent or of another form."""
    value = _value(data, name)
    return list(value) if isinstance(value, Sequence) and all(isinstance(item, Dataset) for item in value) else []


def text(data: Header, name: str) -> str:
    """Return an element as text without blanks around it, empty where it is absent."""
    value = _value(data, name)
    return "" if value is None else str(value).strip().strip("\0")


def integer(data: Header, name: str) -> int:
    """Return a whole number, 0 where it is absent or none."""
    value = numeric(data, name)
    return int(value) if value == int(value) else 0


def numeric(data: Header, name: str) -> float:
    """Return a number, 0 where it is absent, not finite or none."""
    values = numbers(data, name, 1)
    return values[0] if values else 0.0


def numbers(data: Header, name: str, count: int) -> tuple[float, ...] | None:
    """Return exactly `count` finite numbers, or None."""
    found = all_numbers(data, name)
    return found if len(found) == count else None


def all_numbers(data: Header, name: str) -> tuple[float, ...]:
    """Return the finite numbers of an element, none where one of them is anything else."""
    value = _value(data, name)
    if value is None:
        return ()
    parts: Sequence[Any] = [value] if isinstance(value, (float, int, str)) or not isinstance(value, Sequence) else value
    try:
        found = tuple(float(part) for part in parts)
    except (TypeError, ValueError):
        return ()
    return found if all(map(math.isfinite, found)) else ()


def first_number(data: Header, name: str) -> float | None:
    """Return the first of one or several numbers, None where it is none; what follows it has no say."""
    try:
        found = float(written(data, name)[0])
    except (IndexError, TypeError, ValueError):
        return None
    return found if math.isfinite(found) else None


def written(data: Header, name: str) -> Sequence[Any]:
    """Return the values of an element of decimal texts as they are written, also those that are no numbers; none where empty."""
    if isinstance(data, Dataset):
        found: Any = data.get_item(_tag(name)[0])
        value = None if found is None else found.value
    else:
        value = data.get(name)
    if isinstance(value, bytes):
        value = value.decode("latin-1").split("\\")
    parts = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    return [] if all(part is None or not str(part).strip(" \0") for part in parts) else parts


def referenced_frames(source: Dataset) -> Sequence[int]:
    """Return the frames from 0 that a reference names, -1 where it means the object as a whole."""
    value = _value(source, "ReferencedFrameNumber")
    count = len(value) if isinstance(value, Sequence) and not isinstance(value, str) else 1
    return [int(number) - 1 for number in numbers(source, "ReferencedFrameNumber", count) or () if number >= 1] or [-1]


def _value(data: Header, name: str) -> Any:  # noqa: ANN401  # elements hold anything
    if not isinstance(data, Dataset):
        return data.get(name)
    tag, kind = _tag(name)
    try:
        found: Any = data.get_item(tag)
        if not isinstance(found, RawDataElement):
            return None if found is None else found.value
        plain = _plain(found, kind)
        return data[tag].value if plain is None else plain
    except Exception:  # noqa: BLE001  # pydicom converts on access; what it cannot convert counts as absent
        return None


def _plain(raw: RawDataElement, kind: str) -> Any:  # noqa: ANN401  # as `_value`
    """Return what pydicom would make of a number, a code, a UID or a short text, in a tenth of its time; None for all else."""
    kind, value = raw.VR or kind, raw.value or b""
    if kind == "US" and len(value) == 2:
        return int.from_bytes(value, "little" if raw.is_little_endian else "big")
    if kind in PLAIN_NUMBERS and PLAIN_NUMBERS[kind].fullmatch(value):
        found = [float(part) for part in value.split(b"\\")]
        return found if len(found) > 1 else found[0]
    if kind in {"UI", "CS", "LO"} and value.isascii() and b"\x1b" not in value and (kind == "CS" or b"\\" not in value):
        parts = value.decode("ascii").rstrip(" \0").split("\\")
        return parts if len(parts) > 1 else parts[0] or None
    return None


def named(data: Dataset, names: Iterable[str]) -> list[str]:
    """Return those of the keywords whose element is there."""
    return [name for name in names if _tag(name)[0] in data]


@cache
def _tag(name: str) -> tuple[BaseTag, str]:
    """Return the tag of a keyword and its kind of value in the dictionary."""
    return Tag(name), dictionary_VR(name)


def terms(data: Dataset, name: str) -> frozenset[str]:
    """Return the values of an element in capitals, whether it has one or, against the standard, several."""
    value = _value(data, name)
    if value is None:
        return frozenset()
    parts: Sequence[Any] = [value] if isinstance(value, str) or not isinstance(value, Sequence) else value
    return frozenset(str(part).strip().strip("\0").upper() for part in parts if part is not None) - {""}


def _held(data: Dataset) -> str:
    """Return why a look at the pictures is needed, in fixed words; what is said in other than the standard's words counts."""
    kind = text(data, "SOPClassUID")
    if terms(data, "BurnedInAnnotation") - {"NO"}:
        return "the header says that text is burned in"
    if terms(data, "RecognizableVisualFeatures") - {"NO"}:
        return "the header says that the person may be recognised"
    for prefix, why in WRITTEN_INTO.items():
        if kind == prefix or kind.startswith(prefix + "."):
            return why
    if terms(data, "ConversionType") & CONVERTED:
        return "a secondary capture"
    if any(word in term for term in terms(data, "ImageType") for word in CAPTURED):
        return "a picture of a screen"
    if modality(data) not in SAFE_MODALITIES:
        return f"modality {modality(data) or 'unknown'} often has text burned in"
    return "a colour picture from a scanner that makes grey ones" if integer(data, "SamplesPerPixel") > 1 else ""

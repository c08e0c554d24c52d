"""What one file says, as a typed record: technical fields and keyed hashes. A field that is not here is not kept."""

from __future__ import annotations

import sys
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, StringConstraints

Plane = tuple[float, float, float, float, float, float, float, float, float, float, float]
"""Position of the first pixel's centre (3), direction along a row (3), along a column (3), distance of rows and of
columns, in mm and in DICOM's axes (x to the left, y to the back, z to the head)."""

RECIPE_VERSION = "17"
"""Raised whenever equal files give other records or frames; every file is read and every series decoded again then."""
SAFE_MODALITIES = frozenset({"CT", "MR", "PT", "NM", "CR", "DX", "MG"})
"""Scanners that do not write into the picture; from any other source an image is held back."""
MODALITIES = SAFE_MODALITIES | frozenset(
    {"US", "OT", "SC", "XA", "RF", "RG", "ES", "GM", "SM", "OP", "OCT", "OPT", "IO", "PX", "XC", "IVUS", "BI", "TG", "SEG"}
)
"""DICOM's terms that are kept; any other text in their place is not."""

Shared = Annotated[str, AfterValidator(sys.intern)]
"""A text that many records have, in memory once."""
Kind = Annotated[str, StringConstraints(pattern=r"^[a-z-]{1,16}$")]
"""image, volume, picture, none, or a key of `MASKS`."""


class Record(BaseModel):
    """Base of the records: frozen, nothing unknown, finite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class FramePlace(Record):
    """Where one frame of an image lies, in space and in the order of its acquisition."""

    plane: Plane | None = None
    """None where the file does not say."""
    order: tuple[float, ...] = ()
    """Temporal position, trigger time, instance number, frame number."""


class Patch(Record):
    """One part of a mask, such as a frame of a SEG object or a contour: which class it marks, and on which image."""

    number: int
    """Frame number from 0, or the contour's place in its file."""
    label: int
    """Class index; of two patches on one pixel the higher class wins."""
    value: int = 0
    """Of a label map: the stored value that means the class; 0 elsewhere."""
    group: int = 0
    """Number of the segment or region: contours of one group that enclose each other leave holes."""
    image: str = ""
    """Keyed hash of the SOP instance that it refers to, empty where it refers to none."""
    frame: int = -1
    """Frame of that instance from 0, -1 where it names none."""
    plane: Plane | None = None
    """Where the patch itself says that it lies."""
    axes: tuple[float, ...] = ()
    """Directions along a row and along a column, where it says no more; of a contour that names no image, that across it."""


class FileRecord(Record):
    """What is kept of one file's header."""

    kind: Kind
    """What the content is, whatever the name says."""
    fault: int = 0
    """Number of the reason why it is not used; 0 where it may be used."""
    why: str = ""
    """The reason in fixed words and numbers; never a text from the file."""
    patient: Shared = ""
    """Keyed hash, empty where the file names no patient."""
    person: Shared = ""
    """As `patient`, where all folders together tell another one than those of a picture or volume, or "?" where they cannot."""
    nameless: bool = False
    """Of a DICOM object: whether it names nobody, so that its study stands for its patient."""
    number: Shared = ""
    """Where the file names who gave the patient's number: keyed hash of the number alone, which others may have given too."""
    others: tuple[Shared, ...] = ()
    """Of a DICOM image: keyed hashes of further numbers that it gives its patient, whoever gave them."""
    pattern: Shared = ""
    """Keyed hash of the patient's number with its digits left out: whether a name is made in the same way."""
    study: Shared = ""
    """Keyed hash of the study instance UID."""
    series: Shared = ""
    """Keyed hash of the series instance UID."""
    image: str = ""
    """Keyed hash of the SOP instance UID."""
    space: Shared = ""
    """Keyed hash of the frame of reference UID."""
    modality: Shared = ""
    """A defined term of DICOM, or empty."""
    rows: int = 0
    """Height, pixels."""
    columns: int = 0
    """Width, pixels."""
    frames: tuple[FramePlace, ...] = ()
    """Frames of an image."""
    plain: Shared = ""
    """Of an uncompressed grey object of one frame, as JSON: all that turns its pixels into grey values, numbers and terms of
    the standard by keyword. Where given, decoding needs no second look at the header."""
    pixels_at: int = 0
    """Of such an object: byte at which the element of its pixels begins."""
    held: str = ""
    """Why the header alone makes burned-in text likely, in fixed words."""
    mask: bool = False
    """For a volume or a picture: whether its values look like classes."""
    called: bool = False
    """Of a volume: whether its path names a class."""
    called_at: int = 0
    """Of a volume or a picture that is called like a class: 0 where its whole name says so, -1 its end, n its nth folder."""
    unnamed: str = ""
    """Of a volume of classes: values that mean no class of the study, some of them."""
    single: bool = False
    """Of a volume: whether it marks one thing alone, as 1 or 255, or nothing; of a picture whether its pixels are all equal."""
    shape: tuple[int, int, int] = (0, 0, 0)
    """Shape of a volume."""
    affine: tuple[float, ...] = ()
    """Of a volume: rows 1 to 3 of the matrix from voxel index to DICOM's axes, mm."""
    patches: tuple[Patch, ...] = ()
    """Of a form of `MASKS`; of a volume or picture that marks one thing alone and is called like a class, that class."""
    step_mm: float = 0.0
    """Of a SEG object: distance of its frames, else their thickness; 0 where unknown."""
    listed: tuple[str, ...] = ()
    """Keyed hashes of the instances that a mask says it was drawn on: without a patch they are background."""
    listed_series: tuple[str, ...] = ()
    """Of the series that it says so of, where it names none of their instances."""


def whose(record: FileRecord) -> str:
    """Return the keyed hash of the patient whom a file counts for."""
    return record.person or record.patient


def is_image(record: FileRecord) -> bool:
    """Return whether a record is of a picture that a model may see."""
    return not record.fault and (record.kind == "image" or (record.kind in {"volume", "picture"} and not record.mask))


def refused(number: int, why: str, kind: Kind = "none") -> FileRecord:
    """Return the record of a file that is not used, with the reason in fixed words."""
    return FileRecord(kind=kind, fault=number, why=why)


class FrameResult(Record):
    """What became of one frame; `fault` 0 where it may be used."""

    fault: int = 0
    why: str = ""
    entry: str = ""
    digest: str = ""
    """Of the picture on the scale of its series: the key of the feature cache."""
    picture: str = ""
    """Of the ranks of its pixels: equal for copies in other series, however their values were scaled or rounded."""
    rows: int = 0
    columns: int = 0
    low: float = 0.0
    high: float = 0.0
    mean: float = 0.0
    class_px: tuple[int, ...] = ()
    """Pixels of each class."""
    marks: str = ""
    """Digest of its classes, empty where it has no mark."""
    lettered: bool = False
    """Whether text was found in the picture."""

"""One file of an export to its record; whatever is wrong with it is a reason in the record, never an exception."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image
from pydicom.dataset import Dataset

from icmoe.data.images import DEEP_COLOUR, TURNED, read_grey
from icmoe.data.ingest.folding import composed, folded
from icmoe.data.ingest.forms import MASKS, VOLUMES, mask_of, module_of
from icmoe.data.ingest.headers import image_record, name_and_birth, read_header, sequence, terms, text
from icmoe.data.ingest.labels import LabelNames
from icmoe.data.ingest.opening import Refusal, content_of, foreign_form, refusing
from icmoe.data.ingest.pixels import plain_pixels_of
from icmoe.data.ingest.pseudonyms import Pseudonyms
from icmoe.data.ingest.records import FileRecord, FramePlace, Patch, refused
from icmoe.data.ingest.volumes import MASK_VALUES, NO_CLASSES, looks_like_classes, volume_record
from icmoe.data.ingest.walking import (
    NOBODYS,
    called_image,
    called_mask,
    called_scan,
    called_shares,
    is_channel,
    owner,
    person,
    stem,
    told,
    without_visit,
)
from icmoe.errors import IcmoeError

NO_BIRTHS = ("19000101", "00010101")
"""Dates that systems write where they know none."""


@dataclass(frozen=True, slots=True)
class Reader:
    """What reading needs to know of the site.

    Parameters
    ----------
    root
        The export.
    hashes
        Of the site.
    names
        What segments may be called.
    patient_pattern
        Names the patient in paths of pictures and volumes.
    """

    root: Path
    hashes: Pseudonyms
    names: LabelNames
    patient_pattern: str | None

    def read(self, relative: str) -> FileRecord:
        """Return the record of a file below the export's root."""
        try:
            with refusing(117, "file is damaged"):
                return self._read(relative)
        except Refusal as refusal:
            return refused(refusal.number, refusal.why)

    def read_many(self, relatives: Sequence[str]) -> list[FileRecord]:
        """Return the records of several files."""
        return [self.read(relative) for relative in relatives]

    def _read(self, relative: str) -> FileRecord:
        path = self.root / relative
        match content_of(path):
            case "dicom":
                return self._dicom(path)
            case content if content in VOLUMES:
                called, at, part = self.names.said_by(relative)
                among = called_mask(relative) and not called_image(relative)
                record = volume_record(path, called, self.names.values, is_scan=called_scan(relative), among_masks=among)
                if record.mask and called is None and is_channel(relative):
                    record = record.model_copy(update={"mask": False, "single": False, "unnamed": ""})
                if not record.mask and called_shares(relative):
                    raise Refusal(106, NO_CLASSES)
                if called == 0 and at < 1 and record.mask and record.single:
                    raise Refusal(120, "it is called like the background, and what it does not mark may be anything")
                kept = record.patches if record.single or at < 1 else ()  # a folder of label maps may be called like one of them
                patches = tuple(patch.model_copy(update={"group": part}) for patch in kept)
                update = {**self._owner(relative), "called_at": at, "patches": patches}
                return record.model_copy(update={**update, "series": self.hashes.of("file", relative)})
            case "png":
                record = picture_record(path)
                owner = self._owner(relative)
                called, at, part = self.names.said_by(relative)
                mask = (record.mask or called_mask(relative)) and not called_image(relative, called=bool(called))
                series = f"{PurePosixPath(composed(relative)).parent}\0{owner['patient']}"
                patches = (Patch(number=0, label=called, group=part),) if mask and called and at else ()
                update = {**owner, "mask": mask, "patches": patches, "called_at": at}
                return record.model_copy(update={**update, "series": self.hashes.of("folder", series)})
            case _:
                if form := foreign_form(path):
                    raise Refusal(116, form)
                raise Refusal(116, f"file is neither DICOM, {', '.join(form.title for form in VOLUMES.values())} nor PNG")

    def _dicom(self, path: Path) -> FileRecord:
        header = read_header(path)
        if form := mask_of(text(header, "SOPClassUID")):
            marks: FileRecord = module_of(MASKS[form]).record(path, header, self.names, self.hashes)
            return marks
        record = image_record(header, self.hashes)
        others = tuple(sorted({self.hashes.patient(number) for number in _further_numbers(header)}))
        series = _series_by_number(header, self.hashes)
        return record.model_copy(update={**plain_pixels_of(path, header), **series, "others": others})

    def _owner(self, relative: str) -> dict[str, str]:
        """Return whose a file without identity is: the pattern's group, else the folder that is not named for its kind.

        Volumes in a folder without such a name are a patient each; pictures there are all one patient, so that slices of
        one person never come into two splits.
        """
        path = PurePosixPath(relative)
        volume = path.name.lower().endswith(tuple(ending for form in VOLUMES.values() for ending in form.endings))
        named = owner(relative) or (person(stem(relative)) if volume else ".")
        return {"patient": self.hashes.patient(told(relative, self.patient_pattern) or named)}


def _series_by_number(header: Dataset, hashes: Pseudonyms) -> dict[str, str]:
    """Return the series of a file that names it by its number within a study alone: its slices are on one scale."""
    study, number = text(header, "StudyInstanceUID"), text(header, "SeriesNumber")
    if text(header, "SeriesInstanceUID") or not (study and number):
        return {}
    names = ("PatientID", "FrameOfReferenceUID", "Modality")
    return {"series": hashes.of("uid", "\0".join((study, number, *(text(header, name) for name in names))))}


def _further_numbers(header: Dataset) -> frozenset[str]:
    """Return the numbers that a file gives its patient besides PatientID, as after a merger of clinics (PS3.3 C.7.1.1).

    Trials write a number for each visit, 1001_V1 and 1001_V2: without the visit it is the patient's. Name and birth date are what
    `identity` knows the files without any number by.
    """
    items, own = sequence(header, "OtherPatientIDsSequence"), text(header, "PatientID")
    name, _, birth = (known_as := name_and_birth(header)).partition("\0")
    sure = name and own and birth not in {"", *NO_BIRTHS} and not NOBODYS.fullmatch(folded(name))
    at_any_visit = {whole} if (whole := without_visit(folded(own))) != folded(own) else set[str]()
    return (
        terms(header, "OtherPatientIDs")
        | {text(item, "PatientID") for item in items} - {""}
        | at_any_visit
        | ({known_as} if sure else set())
    )


def picture_record(path: Path) -> FileRecord:
    """Return the record of a PNG file.

    Raises
    ------
    Refusal
        117 where it cannot be read.
    """
    try:
        grey_HW = read_grey(path, where="")
        with Image.open(path, formats=("PNG",)) as opened:
            palette = opened.mode == "P" and len(np.unique(np.asarray(opened))) <= MASK_VALUES  # with more it is a picture's
    except (IcmoeError, OSError) as error:
        said = error.faults[0].value if isinstance(error, IcmoeError) else ""
        raise Refusal(117, said if said in {DEEP_COLOUR, TURNED} else "PNG file cannot be decoded or is too large") from None
    mask = palette or looks_like_classes(grey_HW)
    rows, columns = grey_HW.shape
    blank = bool(grey_HW.min() == grey_HW.max())
    return FileRecord(kind="picture", mask=mask, single=blank, rows=rows, columns=columns, frames=(FramePlace(),))

"""What every source of data comes to: slices with masks, per site, and how to read them, from PNG or from a site's store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from icmoe.data.images import read_classes, read_grey
from icmoe.data.picture import marks_digest, picture_digest, picture_of, ranks_digest
from icmoe.data.store import SUFFIX, read_stored
from icmoe.errors import Fault, IcmoeError
from icmoe.study import Label
from icmoe.window import Window, normalise


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """One usable image with its mask.

    Parameters
    ----------
    site
        Hospital that the image comes from; virtual sites keep it.
    patient
        Pseudonym, unique within `site`.
    index
        Position along the acquisition axis.
    split
        Split the patient belongs to.
    image
        PNG file of the image, or its entry in a site's ingest store.
    mask
        PNG file of the mask, or the same entry.
    image_digest
        `picture_digest` on the scale of `window`: the same for every file that stores the same picture.
    shape
        Height and width, pixels.
    window
        Grey values mapped to 0 and 1, common to all slices of the patient.
    spacing_mm
        Distance of neighbouring slices, rows and columns, or None where unknown.
    step
        Difference of neighbours' indices as the patient is listed, whatever was left out of the list; None for one slice, and
        where `spacing_mm` was measured between the slices that are there.
    modality
        A term of DICOM, empty for PNG files.
    classes
        Class indices that the mask holds, ascending.
    marks
        `marks_digest` of the mask, empty where nothing is marked: the same in every form of the mask.
    """

    site: str
    patient: str
    index: int
    split: str
    image: Path
    mask: Path
    image_digest: str
    shape: tuple[int, int]
    window: Window
    spacing_mm: tuple[float, float, float] | None
    step: int | None = None
    modality: str = ""
    classes: tuple[int, ...] = ()
    marks: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteData:
    """All that one site offers, and what was left out.

    Parameters
    ----------
    name
        Name of the site.
    slices
        Usable slices, ordered by hospital, patient, index and file.
    images_found
        Rows of the splits for this site.
    exclusions
        One fault per image that was left out, then a fault 108 where no training image is usable.
    """

    name: str
    slices: tuple[Slice, ...]
    images_found: int
    exclusions: tuple[Fault, ...]

    @property
    def images_used(self) -> int:
        """Number of usable slices in all splits."""
        return len(self.slices)

    def of(self, split: str) -> tuple[Slice, ...]:
        """Return the usable slices of one split, ordered by patient and index."""
        return tuple(item for item in self.slices if item.split == split)


def load_image(item: Slice) -> npt.NDArray[np.float32]:
    """Return a slice on the scale of its series, H x W in [0, 1].

    Raises
    ------
    IcmoeError
        101 or 102 where the file is gone, unreadable or no longer the one that was read at the start.
    """
    where = f"{item.site}/{item.image.name}"
    picture = read_stored(item.image) if item.image.suffix == SUFFIX else picture_of(read_grey(item.image, where=where))
    if picture_digest(ranks_digest(picture.ranks_HW), picture.values_V, item.window) != item.image_digest:
        todo = "Start again: features, window and digest belong to the former image."
        raise IcmoeError(
            Fault(number=102, where=where, what="image changed since the folder was read", did="It was not used.", todo=todo)
        )
    return normalise(picture.values_V, item.window).take(picture.ranks_HW)


def load_truth(item: Slice, labels: Sequence[Label]) -> npt.NDArray[np.uint8]:
    """Return a slice's mask as class indices, H x W.

    Raises
    ------
    IcmoeError
        As `load_mask`; 104 where a file is no longer the one that was read at the start.
    """
    classes_HW = load_mask(item.mask, labels)
    if item.mask.suffix != SUFFIX and (classes_HW.shape != item.shape or marks_digest(classes_HW) != item.marks):
        where, what = f"{item.site}/{item.mask.name}", "mask changed since the folder was read"
        todo = "Start again: what was trained so far belongs to the former mask."
        raise IcmoeError(Fault(number=104, where=where, what=what, did="It was not used.", todo=todo))
    return classes_HW


def load_mask(path: Path, labels: Sequence[Label]) -> npt.NDArray[np.uint8]:
    """Return a mask as class indices, H x W.

    Raises
    ------
    IcmoeError
        103, 104 or 106 as in `icmoe.data.images.read_classes`; 101 or 102 for an entry of a store.
    """
    return read_stored(path).classes_HW if path.suffix == SUFFIX else read_classes(path, labels, where=path.name)

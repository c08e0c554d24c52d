"""The forms of volumes and masks that an export may hold, a line each; what reads one is imported when it is met.

Keys are lower-case letters and hyphens, at most 16, and none of image, volume, picture, none, dicom, png, other.

A module of `VOLUMES` has `is_one(head) -> bool`, of the first bytes of a file (of its content where it is gzipped), and
`read(path) -> (voxels, matrix)`: three axes of real numbers and the 4 x 4 matrix from voxel index to DICOM's axes in mm,
or `Refusal`. It serves images as well as masks of classes.

A module of `MASKS` has `record(path, header, names, hashes) -> FileRecord`, whose `kind` is the key here and which has a
`Patch` for every part that marks a class; `opened(path)`, which reads whatever `draw` needs once; and `draw(opened, patches,
grids, plane, shape)`, which returns the class of every pixel of one image, H x W uint8, from the patches that belong to it:
`grids` says where the pixels of each lie, None for pixel by pixel, and `plane` where the image lies, None where unknown.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeForm:
    """A form of files that hold a volume.

    Parameters
    ----------
    module
        That reads it.
    title
        As people call it.
    endings
        Of file names, in lower case; what a file is, its content says.
    """

    module: str
    title: str
    endings: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskForm:
    """A form of DICOM objects that mark other images.

    Parameters
    ----------
    module
        That reads it.
    sop_classes
        UIDs of the object's classes.
    on_planes
        Whether its patches are points in millimetres on an image's plane rather than pixels of a grid of their own.
    """

    module: str
    sop_classes: frozenset[str]
    on_planes: bool


VOLUMES: dict[str, VolumeForm] = {
    "nifti": VolumeForm(module="icmoe.data.ingest.nifti", title="NIfTI", endings=(".nii.gz", ".nii")),
}
MASKS: dict[str, MaskForm] = {  # the one that says most about its image first: of two on one frame it is used
    "seg": MaskForm(
        module="icmoe.data.ingest.segmentations",
        sop_classes=frozenset({"1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7"}),
        on_planes=False,
    ),
    "contours": MaskForm(
        module="icmoe.data.ingest.contours", sop_classes=frozenset({"1.2.840.10008.5.1.4.1.1.481.3"}), on_planes=True
    ),
}


def module_of(form: VolumeForm | MaskForm) -> ModuleType:
    """Return what reads a form."""
    return importlib.import_module(form.module)


def volume_of(head: bytes) -> str:
    """Return the key of the form of volumes that begins with `head`, empty where none does."""
    return next((key for key, form in VOLUMES.items() if module_of(form).is_one(head)), "")


def mask_of(sop_class: str) -> str:
    """Return the key of the form of masks that a class of DICOM objects is, empty where it is none."""
    return next((key for key, form in MASKS.items() if sop_class in form.sop_classes), "")

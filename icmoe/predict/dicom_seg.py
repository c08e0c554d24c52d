"""A stack's classes as a DICOM SEG object by highdicom: on the source's planes, naming the model and every source image."""

from __future__ import annotations

import copy
import io
import logging
from collections.abc import Sequence
from pathlib import Path

import highdicom
import numpy as np
import numpy.typing as npt
import pydicom
from highdicom.color import CIELabColor
from highdicom.content import AlgorithmIdentificationSequence
from highdicom.seg import Segmentation, SegmentDescription
from highdicom.sr import CodedConcept
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes

from icmoe import __version__
from icmoe.data.ingest.geometry import slice_distance_mm
from icmoe.data.ingest.headers import sequence, text
from icmoe.data.ingest.opening import open_dicom, refusing
from icmoe.errors import Fault, IcmoeError
from icmoe.modelfile import ModelHeader
from icmoe.predict.pictures import colour_of
from icmoe.predict.stacks import Series, Stack
from icmoe.study import Code, Label

# The patient's own values are copied as they are: a viewer joins objects by them, also where they break the standard.
pydicom.config.settings.writing_validation_mode = pydicom.config.IGNORE
logging.getLogger("highdicom").setLevel(logging.ERROR)  # it warns of segmentations that mark nothing

SERIES_NUMBER = 9000
"""Of the first stack; above what scanners count to."""
TEXT = 64
"""Most characters of a DICOM long string."""
IDENTITY = ("PatientID", "PatientName", "AccessionNumber", "StudyID", "ReferringPhysicianName")
STRICT = ("PatientBirthDate", "PatientSex", "StudyDate", "StudyTime")
"""Elements that anonymisers often leave in a form that highdicom refuses; they are copied as they are."""
LETTERS = "SpecificCharacterSet"
"""In which the patient's values are written; highdicom refuses the empty first value that names in two scripts have."""
NOT_POSSIBLE = "its headers do not say what a SEG object must: study, series, or where it lies"


def segmentation_bytes(
    root: Path,
    series: Series,
    stack: Stack,
    classes_DHW: npt.NDArray[np.uint8],
    header: ModelHeader,
    digest: str,
    number: int,
) -> bytes:
    """Return a SEG object, binary, one segment per class but the background.

    Parameters
    ----------
    root, series, stack
        The source.
    classes_DHW
        Class indices in the order of the stack's frames.
    header, digest
        Of the model and its file.
    number
        Of the stack in this prediction, from 0.

    Raises
    ------
    Refusal
        143 where the source's headers lack what the standard asks for.
    """
    with refusing(143, NOT_POSSIBLE):
        sources = _sources(root, series, stack)
        kept = [copy.copy(sources[0][name]) for name in (*STRICT, LETTERS) if name in sources[0]]
        _complete(sources, stack)
        made = Segmentation(
            source_images=sources,
            pixel_array=classes_DHW,
            segmentation_type="BINARY",
            segment_descriptions=_described(header, digest),
            series_instance_uid=highdicom.UID(),
            series_number=SERIES_NUMBER + number,
            series_description=_stamped(header),
            sop_instance_uid=highdicom.UID(),
            instance_number=1,
            manufacturer="icmoe-federated",
            manufacturer_model_name=f"IC-MoE {header.study.name}"[:TEXT],
            software_versions=__version__,
            specific_character_set=None,  # the source's, below
            device_serial_number=digest,
            content_label="IC_MOE",
            content_description=_stamped(header),
        )
        if _is_multi_frame(series, stack):
            _refer_to(made, [frame.number + 1 for frame in stack.frames])
        for element in kept:
            made[element.tag] = element
        buffer = io.BytesIO()
        made.save_as(buffer, enforce_file_format=True)
        return buffer.getvalue()


def require_planes(series: Series, stack: Stack) -> None:
    """Refuse what no SEG object can be made of.

    Raises
    ------
    IcmoeError
        143 where the source is not DICOM, or several frames lie nobody knows where.
    """
    if series.first.kind != "image":
        what = "a DICOM SEG needs a DICOM source"
    elif len(stack.frames) > 1 and None in stack.planes:
        what = "a DICOM SEG needs to know where the frames lie"
    else:
        return
    raise IcmoeError(Fault(number=143, where=stack.frames[0].path, what=what))


def _is_multi_frame(series: Series, stack: Stack) -> bool:
    return len(series.files[stack.frames[0].path].frames) > 1


def _sources(root: Path, series: Series, stack: Stack) -> list[Dataset]:
    """Return the headers of a stack's images; that of a multi-frame object speaks of this stack's frames alone."""
    if _is_multi_frame(series, stack):
        source = open_dicom(root / stack.frames[0].path, pixels=False)
        _keep_frames(source, [frame.number for frame in stack.frames])
        return [source]
    return [open_dicom(root / frame.path, pixels=False) for frame in stack.frames]


def _complete(sources: Sequence[Dataset], stack: Stack) -> None:
    """Make headers say what highdicom asks for, and the same in all of them where they differ by rounding alone.

    Images that lie in no frame of reference, or in one each as some anonymisers leave them, are given a new one: a viewer
    finds their segmentation by the references to them.
    """
    plane, distance_mm = stack.frames[0].plane, slice_distance_mm(stack.planes)
    spaces = {text(source, "FrameOfReferenceUID") for source in sources}
    space = spaces.pop() if len(spaces) == 1 else ""
    space = space or (highdicom.UID() if plane is not None else "")
    for source in sources:
        for name in (*STRICT, *(name for name in IDENTITY if name not in source)):
            setattr(source, name, "")
        if space:
            source.FrameOfReferenceUID = space
        if "SliceThickness" not in source:
            source.SliceThickness = distance_mm
        if plane is not None and "ImageOrientationPatient" in source:
            source.ImageOrientationPatient = sources[0].ImageOrientationPatient
            if plane[9]:
                source.PixelSpacing = list(plane[9:])


def _keep_frames(source: Dataset, numbers: Sequence[int]) -> None:
    """Make a multi-frame header speak of these frames only; axes and distances move to the shared groups."""
    own = sequence(source, "PerFrameFunctionalGroupsSequence")
    chosen = [own[number] for number in numbers if number < len(own)]
    shared = (sequence(source, "SharedFunctionalGroupsSequence") or [Dataset()])[0]
    for name in ("PlaneOrientationSequence", "PixelMeasuresSequence"):
        if name not in shared and chosen and name in chosen[0]:
            shared[name] = chosen[0][name]
    for group in chosen:
        if "PlanePositionSequence" not in group and "PlanePositionSequence" in shared:
            group.PlanePositionSequence = shared.PlanePositionSequence
    source.NumberOfFrames = len(numbers)
    source.SharedFunctionalGroupsSequence = [shared]
    source.PerFrameFunctionalGroupsSequence = chosen


def _refer_to(made: Dataset, numbers: Sequence[int]) -> None:
    """Turn references to the n-th frame of the stack into references to that frame of the source; both count from 1."""
    for group in made.PerFrameFunctionalGroupsSequence:
        for derivation in sequence(group, "DerivationImageSequence"):
            for source in sequence(derivation, "SourceImageSequence"):
                if "ReferencedFrameNumber" in source:
                    source.ReferencedFrameNumber = numbers[int(source.ReferencedFrameNumber) - 1]


def _described(header: ModelHeader, digest: str) -> list[SegmentDescription]:
    study = header.study
    algorithm = AlgorithmIdentificationSequence(
        name=f"IC-MoE {study.name}"[:TEXT],
        family=codes.DCM.ArtificialIntelligence,
        version=__version__,
        source="icmoe-federated",
        parameters={
            "model_sha256": digest,
            "method": header.method,
            "round": str(header.round),
            "study_sha256": study.digest,
            "backbone": study.backbone.name,
            "backbone_sha256": study.backbone.digest,
            "backbone_cut": study.backbone.cut,
        },
    )
    return [
        SegmentDescription(
            segment_number=index,
            segment_label=label.name,
            segmented_property_category=_concept(label, "category"),
            segmented_property_type=_concept(label, "kind"),
            algorithm_type="AUTOMATIC",
            algorithm_identification=algorithm,
            display_color=CIELabColor.from_rgb(*colour_of(index)),
        )
        for index, label in enumerate(study.labels)
        if index
    ]


def _concept(label: Label, name: str) -> CodedConcept:
    """Return the label's code, or tissue: true of whatever is marked in an image of a body, and of nothing in particular."""
    code: Code | None = getattr(label, name)
    if code is None:
        return CodedConcept.from_code(codes.SCT.Tissue)
    return CodedConcept(value=code.value, scheme_designator=code.scheme, meaning=code.meaning)


def _stamped(header: ModelHeader) -> str:
    stamp = "PHANTOMS, not for patients" if header.phantoms else "TEST ONLY" if header.study.test_only else "research use"
    return f"{stamp}: IC-MoE {header.study.name}"[:TEXT]

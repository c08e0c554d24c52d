"""DICOM objects of many forms for tests, each with pixels that the test knows, and what ingest makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
from exports import LESION, export_of, taken
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sr.codedict import codes
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

from icmoe.data.slices import SiteData, load_image, load_mask
from icmoe.study import Label
from icmoe.window import ValueCounts, Window, normalise

RNG = np.random.default_rng(6)
VOLUME = RNG.integers(0, 3000, (5, 20, 24)).astype(np.uint16)
MASKS = np.zeros((5, 20, 24), np.uint8)
for n in range(1, 4):
    MASKS[n, 3 : 8 + n, 5 : 12 + 2 * n] = 1
AXIAL = (1, 0, 0, 0, 1, 0)


def item(**elements: Any) -> Dataset:  # elements hold anything
    """Return a data set with these elements."""
    data = Dataset()
    for name, value in elements.items():
        setattr(data, name, value)
    return data


def image(stored: np.ndarray, syntax: str = ExplicitVRLittleEndian, **elements: Any) -> Dataset:
    """Return an object with these stored pixels, H x W or frames x H x W, as MR without geometry; None takes an element away."""
    kind = elements.get("SOPClassUID", MRImageStorage)
    depth = stored.dtype.itemsize * 8
    data = item(
        SOPClassUID=kind,
        SOPInstanceUID=generate_uid(),
        StudyInstanceUID=generate_uid(),
        SeriesInstanceUID=generate_uid(),
        StudyID="1",
        SeriesNumber=1,
        InstanceNumber=1,
        AccessionNumber="",
        StudyDate="",
        StudyTime="",
        PatientID="Doe 1",
        PatientName="Doe^Jo",
        PatientBirthDate="",
        PatientSex="O",
        ReferringPhysicianName="",
        Manufacturer="Nobody",
        Modality="MR",
        Rows=stored.shape[-2],
        Columns=stored.shape[-1],
        SamplesPerPixel=1,
        PhotometricInterpretation="MONOCHROME2",
        BitsAllocated=depth,
        BitsStored=depth,
        HighBit=depth - 1,
        PixelRepresentation=int(stored.dtype.kind == "i"),
    )
    if stored.ndim == 3:
        data.NumberOfFrames = stored.shape[0]
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = syntax
    data.file_meta.MediaStorageSOPClassUID, data.file_meta.MediaStorageSOPInstanceUID = kind, data.SOPInstanceUID
    data.PixelData = stored.tobytes() + b"\0" * (stored.nbytes % 2)
    for name, value in elements.items():
        if value is None:
            del data[name]
        else:
            setattr(data, name, value)
    return data


def save(data: Dataset, path: Path) -> Path:
    """Write an object with a meta header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
    data.save_as(path, enforce_file_format=True)
    return path


def volume(
    pixels: np.ndarray,
    *,
    axes: Sequence[float] = AXIAL,
    origin: Sequence[float] = (-20.0, -30.0, 40.0),
    step: Sequence[float] | None = None,
    spacing: Sequence[float] = (1.0, 1.5),
    **elements: Any,
) -> list[Dataset]:
    """Return one object per slice of slices x H x W; `step` is the way from slice to slice, 5 mm along the normal if None."""
    along = np.asarray(step) if step is not None else 5.0 * np.cross(axes[:3], axes[3:])
    one = {"SeriesInstanceUID": generate_uid(), "StudyInstanceUID": generate_uid(), "FrameOfReferenceUID": generate_uid()}
    return [
        image(
            grey,
            **{
                **one,
                "InstanceNumber": number + 1,
                "ImagePositionPatient": [float(v) for v in np.asarray(origin) + number * along],
                "ImageOrientationPatient": [float(v) for v in axes],
                "PixelSpacing": list(spacing),
                "SliceThickness": 5.0,
                "PositionReferenceIndicator": "",
                **elements,
            },
        )
        for number, grey in enumerate(pixels)
    ]


def segmentation(
    sources: Sequence[Dataset], pixels: np.ndarray, kind: str, names: Sequence[str] = ("lesion",), **further: Any
) -> Dataset:
    """Return a SEG object made by highdicom."""
    kinds = {"edema": codes.SCT.Edema, "bone": codes.SCT.Bone}
    described = [
        hd.seg.SegmentDescription(
            segment_number=number,
            segment_label=name,
            segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
            segmented_property_type=kinds.get(name.lower(), codes.SCT.Neoplasm),
            algorithm_type=hd.seg.SegmentAlgorithmTypeValues.MANUAL,
        )
        for number, name in enumerate(names, start=1)
    ]
    return hd.seg.Segmentation(
        source_images=list(sources),
        pixel_array=pixels,
        segmentation_type=kind,
        segment_descriptions=described,
        series_instance_uid=generate_uid(),
        series_number=9,
        sop_instance_uid=generate_uid(),
        instance_number=1,
        manufacturer="Nobody",
        manufacturer_model_name="None",
        software_versions="0",
        device_serial_number="0",
        **further,
    )


def plain_segmentation(frames: np.ndarray, groups: Sequence[Dataset], **elements: Any) -> Dataset:
    """Return a binary SEG object written by hand, one segment called lesion; `groups` are those of each frame."""
    kind = item(CodeValue="108369006", CodingSchemeDesignator="SCT", CodeMeaning="Neoplasm")
    segment = item(SegmentNumber=1, SegmentLabel="lesion", SegmentAlgorithmType="MANUAL")
    segment.SegmentedPropertyCategoryCodeSequence, segment.SegmentedPropertyTypeCodeSequence = [kind], [kind]
    for own in groups:
        own.SegmentIdentificationSequence = [item(ReferencedSegmentNumber=1)]
    packed = np.packbits(frames.astype(bool).ravel(), bitorder="little").tobytes()
    written = {
        "SOPClassUID": "1.2.840.10008.5.1.4.1.1.66.4",
        "Modality": "SEG",
        "SegmentationType": "BINARY",
        "SegmentSequence": [segment],
        "NumberOfFrames": len(frames),
        "BitsAllocated": 1,
        "BitsStored": 1,
        "HighBit": 0,
        "PerFrameFunctionalGroupsSequence": list(groups),
        "SharedFunctionalGroupsSequence": [Dataset()],
        "PixelData": packed + b"\0" * (len(packed) % 2),
    }
    return image(frames.astype(np.uint8), **(written | elements))


def derived(source: Dataset, *frames: int) -> Dataset:
    """Return the item of a frame's DerivationImageSequence: from this object, or from these frames of it, counted from 1."""
    reference = item(ReferencedSOPClassUID=source.SOPClassUID, ReferencedSOPInstanceUID=source.SOPInstanceUID)
    if frames:
        reference.ReferencedFrameNumber = list(frames) if len(frames) > 1 else frames[0]
    return item(SourceImageSequence=[reference])


def structures(contours: Sequence[Dataset], *, name: str = "lesion", listed: Sequence[Dataset] = (), space: str = "") -> Dataset:
    """Return an RTSTRUCT with one region of these contours; `listed` are the images that it names as a whole."""
    source = item(
        SOPClassUID="1.2.840.10008.5.1.4.1.1.481.3",
        SOPInstanceUID=generate_uid(),
        StudyInstanceUID=generate_uid(),
        SeriesInstanceUID=generate_uid(),
        PatientID="Doe 1",
        Modality="RTSTRUCT",
        StructureSetROISequence=[item(ROINumber=1, ROIName=name, ReferencedFrameOfReferenceUID=space)],
        ROIContourSequence=[item(ReferencedROINumber=1, ContourSequence=list(contours))],
    )
    references = [item(ReferencedSOPClassUID=one.SOPClassUID, ReferencedSOPInstanceUID=one.SOPInstanceUID) for one in listed]
    series = [item(SeriesInstanceUID=listed[0].SeriesInstanceUID, ContourImageSequence=references)] if listed else []
    source.ReferencedFrameOfReferenceSequence = [
        item(FrameOfReferenceUID=space, RTReferencedStudySequence=[item(RTReferencedSeriesSequence=series)])
    ]
    source.file_meta = FileMetaDataset()
    source.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    source.file_meta.MediaStorageSOPClassUID = source.SOPClassUID
    return source


def contour(points_mm: np.ndarray, on: Dataset | None = None, kind: str = "CLOSED_PLANAR") -> Dataset:
    """Return a contour through N x 3 points, with or without the image that it was drawn on."""
    made = item(
        ContourGeometricType=kind,
        NumberOfContourPoints=len(points_mm),
        ContourData=[round(float(v), 6) for v in points_mm.ravel()],
    )
    if on is not None:
        made.ContourImageSequence = [item(ReferencedSOPClassUID=on.SOPClassUID, ReferencedSOPInstanceUID=on.SOPInstanceUID)]
    return made


def enhanced(
    pixels: np.ndarray,
    frames: Sequence[Dataset],
    shared: Dataset,
    kind: str = "1.2.840.10008.5.1.4.1.1.4.1",
    **elements: Any,
) -> Dataset:
    """Return an enhanced multi-frame object with these functional groups."""
    return image(
        pixels,
        **{
            "SOPClassUID": kind,
            "FrameOfReferenceUID": generate_uid(),
            "PositionReferenceIndicator": "",
            "NumberOfFrames": len(pixels),
            "SharedFunctionalGroupsSequence": [shared],
            "PerFrameFunctionalGroupsSequence": list(frames),
            **elements,
        },
    )


def place(position: Sequence[float], *, stack: int = 1, time: int = 1, **groups: Any) -> Dataset:
    """Return the functional groups of one frame; `groups` are further ones, an item each."""
    content = item(InStackPositionNumber=stack, TemporalPositionIndex=time, StackID="1", FrameAcquisitionNumber=1)
    own = item(FrameContentSequence=[content], PlanePositionSequence=[item(ImagePositionPatient=list(position))])
    for name, group in groups.items():
        setattr(own, name, [group])
    return own


def common(*, axes: Sequence[float] = AXIAL, spacing: Sequence[float] = (1.0, 1.5), **groups: Any) -> Dataset:
    """Return shared functional groups; no spacing where it is empty."""
    made = item(PlaneOrientationSequence=[item(ImageOrientationPatient=list(axes))])
    if spacing:
        made.PixelMeasuresSequence = [item(PixelSpacing=list(spacing), SliceThickness=5.0)]
    for name, group in groups.items():
        setattr(made, name, [group])
    return made


def used(place: Path, labels: tuple[Label, ...] = LESION, **settings: Any) -> tuple[list[np.ndarray], list[np.ndarray], SiteData]:
    """Ingest what is in `place`/export; return pictures and classes in order, and what the index says."""
    data = taken(export_of(place / "export", place / "kept", labels, shares=(1.0, 0.0, 0.0), **settings))
    items = sorted(data.slices, key=lambda one: (one.patient, one.index))
    return [load_image(one) for one in items], [load_mask(one.mask, labels) for one in items], data


def numbers(data: SiteData) -> list[int]:
    return sorted(one.number for one in data.exclusions)


def series_window(images_HW: Sequence[np.ndarray]) -> Window:
    counts = ValueCounts()
    for image_HW in images_HW:
        counts.add_counts(*np.unique(image_HW, return_counts=True))
    return counts.window()


def scaled(greys: Sequence[np.ndarray], low: float = -np.inf, high: float = np.inf) -> list[np.ndarray]:
    window = series_window(list(greys))
    return [normalise(grey, Window(max(low, window.low), min(high, window.high))) for grey in greys]


def same(found: Sequence[np.ndarray], want: Sequence[np.ndarray]) -> bool:
    return len(found) == len(want) and all(np.allclose(one, other, atol=1e-5) for one, other in zip(found, want, strict=True))


def put(place: Path, objects: Sequence[Dataset], names: str = "z{}") -> None:
    for number, data in enumerate(objects):
        save(data, place / "export" / names.format(len(objects) - number))


def lying(position: Sequence[float]) -> Dataset:
    """Return the functional groups of a frame that lies there."""
    return item(PlanePositionSequence=[item(ImagePositionPatient=[float(v) for v in position])])

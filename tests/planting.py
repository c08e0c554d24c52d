"""DICOM series and masks with markers in every text, and the search for them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from highdicom import UID
from highdicom.content import AlgorithmIdentificationSequence
from highdicom.seg import SegmentAlgorithmTypeValues, Segmentation, SegmentationTypeValues, SegmentDescription
from highdicom.sr.coding import CodedConcept
from pydicom import dcmwrite
from pydicom.datadict import DicomDictionary
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

TECHNICAL = re.compile(
    r"^(SOPClassUID|SOPInstanceUID|StudyInstanceUID|SeriesInstanceUID|FrameOfReferenceUID|PatientID|Modality|Rows|Columns"
    r"|Bits\w+|HighBit|PixelRepresentation|SamplesPerPixel|PhotometricInterpretation|PlanarConfiguration|NumberOfFrames|Image\w*Patient"
    r"|\w*PixelSpacing|BurnedInAnnotation|ConversionType|Rescale\w+|Window\w+|VOILUT\w*|ModalityLUT\w*|LUT\w*|PixelPadding\w*"
    r"|PixelAspectRatio|ImageType|SpecificCharacterSet|LossyImage\w*|RecognizableVisualFeatures|PresentationLUTShape"
    r"|TriggerTime|TemporalPositionIdentifier|AcquisitionNumber|InstanceNumber"
    r"|TransferSyntaxUID|.*FunctionalGroupsSequence|PixelValueTransformationSequence|PixelData.*|Extended\w+)$"
)
"""What decides how pixels are read and in which order; everything else of the dictionary gets a marker."""
SEQUENCES = ("ReferencedImageSequence", "RequestAttributesSequence", "OriginalAttributesSequence", "OtherPatientIDsSequence")


def marked(token: str) -> Dataset:
    """Return a data set with a marker in every element of the dictionary that holds text and decides nothing."""
    data = Dataset()
    for tag, (kind, many, _, retired, keyword) in DicomDictionary.items():
        if tag < 0x00080000 or not keyword or retired or keyword.startswith("Group") or TECHNICAL.match(keyword):
            continue
        value = text_of(kind, f"{tag:08X}"[-4:], token)
        if value is not None:
            setattr(data, keyword, value if many.startswith("1") else [value] * int(re.match(r"\d+", many)[0]))
    return data


def text_of(kind: str, short: str, token: str) -> str | None:
    """Return a text that the value representation allows, with the marker in it, None for numbers and bytes."""
    number = number_of(token)
    forms = {
        **dict.fromkeys(("LO", "ST", "LT", "UT", "UC"), f"ZQ{token} {kind} {short}"),
        **dict.fromkeys(("SH", "CS", "AE"), f"ZQ{token}{kind}"),
        "PN": f"ZQ{token}^Given^{short}",
        "UR": f"https://ZQ{token}.example/{short}",
        "UI": f"1.2.826.0.1.{number}.{int(short, 16)}.77",
        "DA": f"19{number % 80 + 10}0229",
        "DT": f"19{number % 80 + 10}0229{number % 14 + 10}4637.{number}",
        "TM": f"{number % 14 + 10}4637.{number}",
        "AS": "077Y",
        "DS": f"{number}.731",
        "IS": f"7{number}31",
    }
    return forms.get(kind)


def number_of(token: str) -> int:
    """Return the five digits that stand for the token where only digits are allowed."""
    return int(token, 16) % 90_000 + 10_000


def markers(token: str) -> list[bytes]:
    """Return what must not be found anywhere."""
    number = number_of(token)
    texts = [f"ZQ{token}", f"0.1.{number}.", f"4637.{number}", f"{number}.731", f"7{number}31"]
    return [text.encode() for text in texts]


def planted_series(folder: Path, token: str, slices: int, seed: int) -> None:
    """Write an MR series and its SEG with markers in every text, in sequences, in private tags and in file names."""
    rng, uids = np.random.default_rng(seed), [generate_uid() for _ in range(3)]
    images = [image(rng, number, uids, f"ZQ{token} id") for number in range(slices)]
    mask = np.zeros((slices, 32, 32), np.uint8)
    mask[:, 8:20, 6:18] = 1
    seg = segmentation(images, mask)
    folder = folder / f"ZQ{token} folder"
    folder.mkdir(parents=True)
    for number, data in enumerate([*images, seg]):
        for element in marked(token):
            if element.tag not in data or element.VR in {"DA", "TM", "LO", "SH", "PN"}:
                data[element.tag] = element
        data.PatientID = f"ZQ{token} id"
        for keyword in SEQUENCES:
            setattr(data, keyword, Sequence([marked(token)]))
        data.private_block(0x0099, f"ZQ{token} private", create=True).add_new(1, "LO", f"ZQ{token}")
        data.file_meta.SourceApplicationEntityTitle = f"ZQ{token}"
        dcmwrite(folder / f"ZQ{token} {number}.dcm", data, enforce_file_format=True)


def image(rng: np.random.Generator, number: int, uids: list[str], patient: str) -> Dataset:
    """Return one MR slice with what decoding needs and what highdicom copies into a SEG."""
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.SOPClassUID, data.SOPInstanceUID, data.Modality, data.PatientID = MRImageStorage, generate_uid(), "MR", patient
    data.StudyInstanceUID, data.SeriesInstanceUID, data.FrameOfReferenceUID = uids
    data.PatientBirthDate, data.PatientSex, data.StudyDate, data.StudyTime = "", "O", "19010101", "101010"
    data.PatientName = data.AccessionNumber = data.StudyID = data.ReferringPhysicianName = ""
    data.Rows, data.Columns, data.SamplesPerPixel, data.PhotometricInterpretation = 32, 32, 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 12, 11, 0
    data.ImagePositionPatient, data.ImageOrientationPatient = [0, 0, 5.0 * number], [1, 0, 0, 0, 1, 0]
    data.PixelSpacing, data.SliceThickness, data.InstanceNumber = [1.0, 1.0], 5.0, number + 1
    data.PixelData = rng.integers(0, 4000, (32, 32)).astype(np.uint16).tobytes()
    return data


def segmentation(images: list[Dataset], mask: np.ndarray) -> Segmentation:
    """Return a binary SEG of one segment on the images."""
    kind = CodedConcept("52988006", "SCT", "Lesion")
    drawn = SegmentDescription(
        1,
        "lesion",
        kind,
        kind,
        SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=AlgorithmIdentificationSequence("none", kind, "1"),
    )
    return Segmentation(
        source_images=images,
        pixel_array=mask,
        segmentation_type=SegmentationTypeValues.BINARY,
        segment_descriptions=[drawn],
        series_instance_uid=generate_uid(),
        series_number=2,
        sop_instance_uid=UID(),
        instance_number=1,
        manufacturer="none",
        manufacturer_model_name="none",
        software_versions="1",
        device_serial_number="1",
    )


def search(token: str, what: str, content: bytes) -> None:
    for marker in markers(token):
        assert marker not in content, f"{marker!r} is in {what}"

"""Exports that went through an anonymiser, another archive or a disk that is old."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from dicom_builders import VOLUME, contour, image, numbers, put, save, structures, used, volume
from pydicom.uid import LegacyConvertedEnhancedCTImageStorage, MRImageStorage
from test_ingest_masks import square

pytestmark = pytest.mark.usefixtures("in_this_process")


@pytest.mark.parametrize(
    ("emptied", "reason"), [(("SOPInstanceUID",), 117), (("SOPClassUID",), 117), (("SOPInstanceUID", "SOPClassUID"), 116)]
)
def test_an_object_whose_uid_was_emptied_is_called_one(emptied: tuple[str, ...], reason: int, tmp_path: Path):
    """To be told that they are no DICOM would let somebody remove them instead of exporting them again."""
    (source,) = volume(VOLUME[:1])
    for name in emptied:
        source[name].value = ""
    path = tmp_path / "export" / "a.dcm"
    path.parent.mkdir()
    source.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    source.save_as(path, enforce_file_format=True, implicit_vr=False, little_endian=True)
    data = used(tmp_path)[2]
    assert numbers(data) == [108, reason]


@pytest.mark.parametrize("kind", [MRImageStorage, LegacyConvertedEnhancedCTImageStorage])
def test_an_image_that_was_cut_off_in_its_header_is_not_passed_over_as_a_report(kind: str, tmp_path: Path):
    path = save(image(VOLUME[0], SOPClassUID=kind), tmp_path / "export" / "a.dcm")
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"\x28\x00\x10\x00US")])  # before its rows
    assert numbers(used(tmp_path)[2]) == [108, 117]


@pytest.mark.parametrize(
    ("folder", "written", "reason"),
    [
        ("one", {}, 121),
        ("two", {}, 0),
        (".", {}, 0),
        ("one", {"StudyInstanceUID": "1.2"}, 0),
        ("one", {"PatientID": "Two"}, 0),
        ("two", {"PatientID": "One"}, 121),
    ],
)
def test_one_frame_of_reference_for_everybody_tells_nobody_apart(
    folder: str, written: dict[str, str], reason: int, tmp_path: Path
):
    """Contours of a patient whose images are missing, after an anonymiser that wrote one UID for all and emptied the number."""
    two = volume(VOLUME, PatientID="Two", StudyInstanceUID="1.2", FrameOfReferenceUID="1.2.3")
    three = volume(VOLUME + np.arange(24, dtype=np.uint16), PatientID="Three")
    made = structures([contour(square(two[1], 2.4, 3.4, 12.6, 15.6))], space="1.2.3")
    made.PatientID = ""
    for name, value in written.items():
        setattr(made, name, value)
    put(tmp_path, two, "two/{}")
    put(tmp_path, three, "three/{}")
    put(tmp_path, [made], f"{folder}/contours-{{}}")
    _, masks, data = used(tmp_path)
    assert len(masks) == (0 if reason else 1)
    assert (reason in numbers(data)) == bool(reason)

"""Exports that went through an anonymiser, another archive or a disk that is old."""

from __future__ import annotations

from pathlib import Path

import pytest
from dicom_builders import VOLUME, numbers, used, volume

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

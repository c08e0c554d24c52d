"""Values of a header that are read without pydicom, since they are plain, are those that pydicom reads."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.tag import Tag

from icmoe.data.ingest.headers import all_numbers, terms, text


@pytest.mark.parametrize("name", ["SOPClassUID", "Modality", "PatientID", "PatientBirthDate", "PatientName"])
@pytest.mark.parametrize(
    "value", [b"", b"  ", b"A^B  ", b"a\0", b"A\\B ", b"^^^", b"A^B=C", b"\xc4rger^A", b"\x1b(BA", b"20240101"]
)
def test_a_text_reads_as_from_pydicom(name: str, value: bytes) -> None:
    header, want = _with(name, value)
    assert text(header, name) == ("" if want is None else str(want).strip().strip("\0"))
    assert terms(header, name) == terms({name: want}, name)


@pytest.mark.parametrize("name", ["InstanceNumber", "PixelSpacing", "Rows"])
@pytest.mark.parametrize("value", [b"", b"  ", b"7 ", b" 1.50 ", b"1\\2 ", b"1e3", b"0x1f", b"nan", b"\x01\x02"])
def test_a_number_reads_as_from_pydicom(name: str, value: bytes) -> None:
    header, want = _with(name, value)
    assert all_numbers(header, name) == all_numbers({name: want}, name)


def _with(name: str, value: bytes) -> tuple[Dataset, Any]:
    """Return a header with an element as written, and what pydicom makes of that, None where it makes nothing."""
    tag, kind = Tag(name), dictionary_VR(name)
    header = Dataset({tag: RawDataElement(tag, kind, len(value), value, 0, is_implicit_VR=False, is_little_endian=True)})
    header.set_original_encoding(False, True, ["latin_1"])
    try:
        return header, deepcopy(header)[tag].value
    except Exception:
        return header, None

"""Plain headers are read without pydicom: what is found is what pydicom finds, and what is odd is left to it."""

from __future__ import annotations

import random
from copy import deepcopy
from pathlib import Path
from typing import Any

import pydicom
import pytest
from dicom_builders import image, save
from pydicom.data import get_testdata_file
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from icmoe.data.ingest.headers import KEYWORDS, SCANNED, TAGS, all_numbers, terms, text
from icmoe.data.ingest.opening import open_dicom
from icmoe.data.ingest.scanning import scanned, tag_of

CT = Path(str(get_testdata_file("CT_small.dcm", download=False)))
FILES = sorted(CT.parent.glob("*.dcm"))
HEAD = 70_000


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_is_found_in_a_header_is_what_pydicom_finds(path: Path) -> None:
    found = scanned(path, SCANNED)
    if found is not None:
        _assert_same(found, path)


def test_damaged_headers_are_read_as_pydicom_reads_them_or_left_to_it(tmp_path: Path) -> None:
    rng, path, read = random.Random(7), tmp_path / "damaged.dcm", 0
    heads = [head for file in FILES if len(head := file.read_bytes()[:HEAD]) > 200]
    for _ in range(400):
        head = bytearray(rng.choice(heads))
        for _ in range(rng.choice((1, 1, 2, 5))):
            at = rng.randrange(128, min(len(head), 2000))
            head[at] = rng.choice((0, 255, head[at] ^ 1, rng.randrange(256)))
        path.write_bytes(head[: rng.randrange(100, len(head))] if rng.random() < 0.2 else head)
        if (found := scanned(path, SCANNED)) is not None:
            _assert_same(found, path)
            read += 1
    assert read > 50


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_a_plain_header_is_not_left_to_pydicom(syntax: str, tmp_path: Path) -> None:
    assert scanned(save(_picture(syntax), tmp_path / "plain.dcm"), SCANNED) is not None


@pytest.mark.parametrize("syntax", [ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian])
def test_another_byte_order_and_deflated_content_are_left_to_pydicom(syntax: str, tmp_path: Path) -> None:
    assert scanned(save(_picture(syntax), tmp_path / "odd.dcm"), SCANNED) is None


def test_a_header_that_is_long_or_ends_before_its_pixels_or_names_no_class_is_left_to_pydicom(tmp_path: Path) -> None:
    long, ended, nameless = (_picture(ExplicitVRLittleEndian) for _ in range(3))
    long.add_new(0x00091001, "OB", bytes(HEAD))
    del ended.PixelData
    nameless.SOPClassUID = ""
    for name, data in {"long": long, "ended": ended, "nameless": nameless}.items():
        assert scanned(save(data, tmp_path / name), SCANNED) is None


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
    tag, kind = tag_of(name)
    header = Dataset({tag: RawDataElement(tag, kind, len(value), value, 0, is_implicit_VR=False, is_little_endian=True)})
    header.set_original_encoding(False, True, ["latin_1"])
    try:
        return header, deepcopy(header)[tag].value
    except Exception:
        return header, None


def _picture(syntax: str) -> Dataset:
    data = image(pydicom.dcmread(CT).pixel_array, syntax)
    data.PatientName, data.PatientID = "Doe^Jane", "17"
    return data


def _assert_same(found: Dataset, path: Path) -> None:
    whole = open_dicom(path, pixels=False, tags=TAGS)
    assert (found.read_to_byte, found.original_encoding) == (whole.read_to_byte, whole.original_encoding)
    assert found.file_meta.TransferSyntaxUID == whole.file_meta.TransferSyntaxUID
    for name in KEYWORDS:
        tag, _ = tag_of(name)
        assert found.get_item(tag) == whole.get_item(tag), name
        assert (text(found, name), terms(found, name)) == (text(whole, name), terms(whole, name)), name
        assert all_numbers(found, name) == all_numbers(whole, name), name

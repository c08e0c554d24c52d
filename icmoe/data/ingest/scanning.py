"""The chosen elements of a plain DICOM header, found in its first bytes in a third of the time that pydicom takes.

Whatever is unusual about a file is left to pydicom, so that both give the same elements: other byte orders, deflated content,
sequences of undefined length, kinds of value that are not the standard's, a header that is long or ends before its pixels.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from functools import cache, lru_cache
from pathlib import Path
from struct import Struct
from typing import Any

from pydicom.charset import convert_encodings, default_encoding
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import RawDataElement, convert_raw_data_element, empty_value_for_VR
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.tag import BaseTag, Tag
from pydicom.uid import (
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000TransferSyntaxes,
    JPEGLSTransferSyntaxes,
    JPEGTransferSyntaxes,
    RLELossless,
)
from pydicom.valuerep import EXPLICIT_VR_LENGTH_32, VR

SCANNED_BYTES = 2**16
"""Most headers are a few thousand bytes."""
MARK_AT, META_AT, MARK = 128, 132, b"DICM\x02\0\0\0UL\x04\0"
"""Where the mark of the form is and where the meta header begins, and both as they must be."""
META_GROUP, FIRST_GROUP = 2, 8
SYNTAX, CHARACTER_SET, CLASS, INSTANCE = 0x00020010, 0x00080005, 0x00080016, 0x00080018
PIXELS = frozenset({0x7FE00008, 0x7FE00009, 0x7FE00010})
"""Elements before which reading stops."""
ITEM_END, UNDEFINED = 0xFFFEE00D, 0xFFFFFFFF
KINDS = {kind.encode(): (str(kind.value), kind in EXPLICIT_VR_LENGTH_32) for kind in VR}
"""Of each kind of value as it is written: its name, and whether its length has four bytes."""
ODD = "", False
EXPLICIT, IMPLICIT, LENGTH = (Struct(form).unpack_from for form in ("<HH2sH", "<HHL", "<L"))
SYNTAXES = frozenset(
    {ImplicitVRLittleEndian, ExplicitVRLittleEndian, RLELossless}
    | {*JPEGTransferSyntaxes, *JPEGLSTransferSyntaxes, *JPEG2000TransferSyntaxes}
)
"""Transfer syntaxes whose headers are little endian and not deflated."""
PLAIN_NUMBERS = {"IS": re.compile(rb" *[+-]?\d+ *"), "DS": re.compile(rb"(?:(?:^|\\) *[+-]?\d+(?:\.\d*)?(?:[eE][+-]?\d+)? *)+")}
PLAIN_TEXTS = {"CS": b"\x1b", **dict.fromkeys(("UI", "LO", "DA"), b"\x1b\\"), "PN": b"\x1b\\="}
"""With the bytes that make them more than that."""
SHORT = 256
"""Bytes of a value up to which it is remembered."""


@cache
def tag_of(name: str) -> tuple[BaseTag, str]:
    """Return the tag of a keyword, one object for all who look for it, and its kind of value in the dictionary."""
    return Tag(name), dictionary_VR(name)


def scanned(path: Path, wanted: Mapping[int, BaseTag]) -> Dataset | None:
    """Return elements of a file as `opening.open_dicom` does, or None where that has to be asked.

    Parameters
    ----------
    path
        The file.
    wanted
        Tags by their numbers, those of class, instance and character set among them.
    """
    try:
        with path.open("rb", buffering=0) as file:
            return _scanned(file.read(SCANNED_BYTES), wanted)
    except Exception:  # noqa: BLE001  # odd, damaged or not to be read: what that means is said elsewhere
        return None


def _scanned(head: bytes, wanted: Mapping[int, BaseTag]) -> Dataset | None:
    meta, start = _meta(head)
    implicit = meta.TransferSyntaxUID == ImplicitVRLittleEndian
    code = head[start + 4 : start + 6]
    if head[MARK_AT : MARK_AT + len(MARK)] != MARK or (code.isalpha() and code.isupper()) == implicit:
        return None
    found = dict[BaseTag, Any]()
    for begin, number, kind, at, length in _elements(head, start, implicit=implicit):
        if number in PIXELS:
            return _data(found, meta, begin, wanted)
        if kind == "" or length == UNDEFINED or number == ITEM_END:
            return None
        if tag := wanted.get(number):
            value: Any = head[at : at + length] if length else empty_value_for_VR(kind, raw=True)
            found[tag] = RawDataElement(tag, kind, length, value, at, implicit, is_little_endian=True)
    return None


def _elements(head: bytes, at: int, *, implicit: bool) -> Iterator[tuple[int, int, str | None, int, int]]:
    """Yield of each element where it begins, its tag, its kind, where its value begins and how long that is.

    The kind is None where none is written, and empty where it is none of the standard's. Bytes that end raise an error.
    """
    while True:
        begin, kind = at, None
        if implicit:
            group, element, length = IMPLICIT(head, at)
        else:
            group, element, code, length = EXPLICIT(head, at)
            kind, long = KINDS.get(code, ODD)
            if long:
                (length,) = LENGTH(head, at + 8)
                at += 4
        yield begin, group << 16 | element, kind, at + 8, length
        at += 8 + length


def _meta(head: bytes) -> tuple[FileMetaDataset, int]:
    """Return what is needed of the meta header, and where the data set begins."""
    syntax = b""
    for begin, number, kind, at, length in _elements(head, META_AT, implicit=False):
        if number >> 16 != META_GROUP:
            if number >> 16 < FIRST_GROUP:  # a command
                break
            return _meta_of(syntax), begin
        if not kind:
            break
        if number == SYNTAX:
            syntax = head[at : at + length] if kind == "UI" else b""
    raise ValueError("odd meta header")


@lru_cache(maxsize=64)
def _meta_of(syntax: bytes) -> FileMetaDataset:
    """Return a meta header that names the transfer syntax alone, one for all files: nobody changes it."""
    tag = Tag(SYNTAX)
    meta = FileMetaDataset({tag: RawDataElement(tag, "UI", len(syntax), syntax, 0, is_implicit_VR=False, is_little_endian=True)})
    if meta.TransferSyntaxUID not in SYNTAXES:
        raise ValueError("another transfer syntax")
    return meta


def _data(found: dict[BaseTag, Any], meta: FileMetaDataset, end: int, wanted: Mapping[int, BaseTag]) -> Dataset | None:
    """Return a data set that names its class and its instance, as pydicom makes it from a file."""
    if not all((found[wanted[number]].value or b"")[:1].isdigit() for number in (CLASS, INSTANCE)):
        return None
    own, first, data = found.get(wanted[CHARACTER_SET]), found[wanted[CLASS]], Dataset(found)
    encodings = _encodings(own.VR, own.value) if own else default_encoding
    data.set_original_encoding(first.is_implicit_VR, first.is_little_endian, encodings)
    data.file_meta, data.read_to_byte = meta, end
    return data


@lru_cache(maxsize=64)
def _encodings(kind: str | None, value: bytes | None) -> str | list[str]:
    """Return what the texts of a file are written in."""
    raw = RawDataElement(Tag(CHARACTER_SET), kind, len(value or b""), value, 0, kind is None, is_little_endian=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return convert_encodings(convert_raw_data_element(raw).value)


@lru_cache(maxsize=2**12)
def plain_value(kind: str, value: bytes, *, little: bool) -> Any:  # noqa: ANN401  # elements hold anything
    """Return what pydicom would make of a number, a code, a UID or a short text, in a tenth of its time; None for all else.

    It is remembered, as headers of a series hold the same bytes again and again; nobody changes the lists.
    """
    if kind == "US" and len(value) == 2:
        return int.from_bytes(value, "little" if little else "big")
    if kind in PLAIN_NUMBERS and PLAIN_NUMBERS[kind].fullmatch(value):
        found = [float(part) for part in value.split(b"\\")]
        return found if len(found) > 1 else found[0]
    if kind in PLAIN_TEXTS and value.isascii() and not any(map(value.__contains__, PLAIN_TEXTS[kind])):
        parts = value.decode("ascii").rstrip(" \0").split("\\")
        return parts if len(parts) > 1 else parts[0]
    return None

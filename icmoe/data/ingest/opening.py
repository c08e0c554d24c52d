"""Open what lies in an export: what a file is by its content, and DICOM data sets with every limit that a bad file needs.

pydicom's messages repeat the values they complain about, so that they are neither logged nor shown.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pydicom
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset, FileDataset
from pydicom.tag import BaseTag, Tag
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from icmoe.data.ingest.forms import volume_of
from icmoe.data.ingest.refusals import Refusal, refusing

MAX_BYTES = 2**32
"""Largest file."""
MAX_INFLATED_BYTES = 2**30
"""Largest content of a deflated file, which is held in memory as a whole."""
PREAMBLE_AND_GROUP_LENGTH = 144
HEAD_BYTES = 352
"""Bytes that tell what a file is."""
PACKED_HEAD_BYTES = 2**16
"""Bytes of a gzip file that are read for them: it may begin with a name and a comment, and have several members."""

FOREIGN = {
    b"ObjectType": "MetaImage (.mha, .mhd)",
    b"NRRD000": "NRRD (.nrrd, .nhdr)",
    b"\x5c\x01\0\0": "Analyze (.hdr, .img)",
    b"\0\0\x01\x5c": "Analyze (.hdr, .img)",
}
"""How volumes begin that people export beside those of `VOLUMES`, and that nothing here reads."""

ARCHIVES = {
    b"PK\x03\x04": "zip",
    b"\x1f\x8b": "gzip",
    b"7z\xbc\xaf\x27\x1c": "7-Zip",
    b"Rar!\x1a\x07": "RAR",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
}
"""How files begin that hold others, as systems export a study at a time."""
TAR_AT = 257

IDENTITY = (Tag("SOPClassUID"), Tag("SOPInstanceUID"))

pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
logging.getLogger("nibabel").setLevel(logging.CRITICAL + 1)


def content_of(path: Path) -> str:
    """Return what a file is by its first bytes: "dicom", "png", a key of `VOLUMES` or "other"; its name has no say.

    Raises
    ------
    Refusal
        116 where it is a link, 117 where it cannot be read or is larger than `MAX_BYTES`.
    """
    if path.is_symlink():
        raise Refusal(116, "a link, which is not followed")
    with refusing(117, "file cannot be opened"), path.open("rb") as file:
        head = file.read(HEAD_BYTES)
        packed = head + file.read(PACKED_HEAD_BYTES - HEAD_BYTES) if head.startswith(b"\x1f\x8b") else b""
        size = file.seek(0, 2)
    if size > MAX_BYTES:
        raise Refusal(117, f"file is larger than {MAX_BYTES >> 30} GiB")
    if head[128:132] == b"DICM":
        return "dicom"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if packed:
        with refusing(116, "a compressed file that is no volume"):
            head = _unpacked_head(packed)
    # DICOM without preamble starts with an element of group 2 or 8, in either byte order.
    plain = "dicom" if head[:2] in {b"\x02\x00", b"\x08\x00", b"\x00\x08"} and not packed else "other"
    return volume_of(head) or plain


def foreign_form(path: Path) -> str:
    """Return what form a file has that nothing here reads and what to do, empty where that is not known."""
    with refusing(117, "file cannot be opened"), path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    archives = [*(form for start, form in ARCHIVES.items() if head.startswith(start)), *["tar"] * (head[TAR_AT:][:5] == b"ustar")]
    if archives:
        return f"an archive or packed file ({archives[0]}), which is not looked into; unpack it"
    found = next((form for start, form in FOREIGN.items() if head.lstrip().startswith(start)), "")
    return f"a file in {found}, a form that is not read; save it as NIfTI" if found else ""


def _unpacked_head(packed: bytes) -> bytes:
    """Return the first bytes of the content of a gzip file, from its own first bytes; fewer where it ends before."""
    head = b""
    while packed and len(head) < HEAD_BYTES:
        member = zlib.decompressobj(wbits=31)
        head += member.decompress(packed, HEAD_BYTES - len(head))
        packed = member.unused_data
    return head


def open_dicom(path: Path, *, pixels: bool, tags: Sequence[BaseTag] | None = None) -> FileDataset:
    """Return a DICOM data set that names its class, its instance and its transfer syntax.

    Its attribute `read_to_byte` is where reading stopped.

    Parameters
    ----------
    path
        The file.
    pixels
        Whether to read the pixels too.
    tags
        What to read; all where None.

    Raises
    ------
    Refusal
        116 where it is not DICOM, 117 where it cannot be parsed.
    """
    chosen = None if tags is None else [*tags, *IDENTITY]
    with refusing(117, "DICOM header cannot be parsed"):
        try:
            with _bounded(path).open("rb") as file:
                data = pydicom.dcmread(file, stop_before_pixels=not pixels, force=True, specific_tags=chosen)
                data.read_to_byte = file.tell()
        except (EOFError, MemoryError, RecursionError):
            raise Refusal(117, "DICOM header ends too early or is nested too deeply") from None
        if not all(_names_uid(data, tag) for tag in IDENTITY):
            meta = str(data.file_meta.get("MediaStorageSOPClassUID") or "")
            if meta == "1.2.840.10008.1.3.10":
                raise Refusal(119, "an index of a medium (DICOMDIR), not an image")
            if content_of(path) == "dicom" and data.preamble and not data.file_meta.get("TransferSyntaxUID"):
                raise Refusal(117, "its meta header names no transfer syntax, and neither class nor instance is named")
            if any(_names_uid(data, tag) for tag in IDENTITY):  # the meta header's stay what they were before it was changed
                raise Refusal(117, "it names its class or its instance, but not both, as where an anonymiser emptied one")
            raise Refusal(116, "no DICOM object: it names neither class nor instance")
        _complete_syntax(data)
        return data


def pictureless(sop_class: str) -> Refusal:
    """Return why an object that does not say how large its picture is has none.

    A file that was cut short between two elements reads like one that ends there.
    """
    if "Image Storage" in UID(sop_class).name:
        return Refusal(117, "an image whose header ends before it says how large it is, as where a file was cut short")
    return Refusal(119, "an object without pixels, such as a report, a plan or a presentation state")


def _names_uid(data: Dataset, tag: BaseTag) -> bool:
    """Return whether an element has a value; one that is plainly a UID is not converted for that."""
    found: Any = data.get_item(tag)
    if isinstance(found, RawDataElement) and found.VR in {"UI", None} and (found.value or b"")[:1].isdigit():
        return True
    return found is not None and bool(str(data[tag].value or ""))


def _bounded(path: Path) -> Path:
    """Return the path after a look at how large its content would be, where DEFLATE (at most 1032 to 1) could reach the limit."""
    if path.stat().st_size * 1032 <= MAX_INFLATED_BYTES:
        return path
    try:
        meta = pydicom.filereader.read_file_meta_info(path)
        if meta.get("TransferSyntaxUID") != DeflatedExplicitVRLittleEndian:
            return path
        start = PREAMBLE_AND_GROUP_LENGTH + int(meta.FileMetaInformationGroupLength)
    except Exception:  # noqa: BLE001  # no meta header: it is not deflated either
        return path
    if _inflated(path, start) > MAX_INFLATED_BYTES:
        raise Refusal(117, f"content is larger than {MAX_INFLATED_BYTES >> 30} GiB when inflated")
    return path


def _inflated(path: Path, start: int) -> int:
    """Return the bytes that a deflated data set holds, counted without keeping them, up to a little over the limit."""
    inflater, total = zlib.decompressobj(-zlib.MAX_WBITS), 0
    with path.open("rb") as file:
        file.seek(start)
        while total <= MAX_INFLATED_BYTES and not inflater.eof:
            rest = inflater.unconsumed_tail or file.read(2**16)
            if not rest:
                break
            total += len(inflater.decompress(rest, 2**20))
    return total


def _complete_syntax(data: FileDataset) -> None:
    """Name the transfer syntax of a file whose meta header does not; encapsulated pixels cannot be guessed."""
    if data.file_meta.get("TransferSyntaxUID"):
        return
    implicit, little = data.original_encoding
    plain = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
    data.file_meta.TransferSyntaxUID = plain if little in {True, None} else ExplicitVRBigEndian


__all__ = ["Dataset", "Refusal", "content_of", "foreign_form", "open_dicom", "pictureless", "refusing"]

"""Split files: which image of which patient of which site belongs to train, val or test."""

from __future__ import annotations

import csv
import io
import math
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from icmoe.atomic import read_regular
from icmoe.config import in_utf16
from icmoe.data.ingest.folding import composed
from icmoe.errors import NOT_STARTED, Fault, IcmoeError

SPLITS = ("train", "val", "test")
COLUMNS = ("split", "site", "patient", "slice", "image", "mask")
SPACING_COLUMNS = ("spacing_slice_mm", "spacing_row_mm", "spacing_col_mm")
MAX_SPACING_MM = 1000.0
MAX_FAULTS = 50
"""Faults of one file that are spelled out; the rest is counted."""

_SITE = re.compile(r"\w[\w .-]{0,63}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of a split file, its texts checked, its files not yet opened.

    Parameters
    ----------
    split
        Name of the split the line belongs to.
    site
        Name of the hospital.
    patient
        Pseudonym, unique within the site.
    index
        Position of the slice along the acquisition axis.
    image
        Path of the image relative to the data folder.
    mask
        Path of the mask relative to the data folder.
    spacing
        The three spacing columns as text, empty where absent.
    """

    split: str
    site: str
    patient: str
    index: int
    image: str
    mask: str
    spacing: tuple[str, str, str] = ("", "", "")


def read_rows(path: Path, split: str, *, where: str, same_split: bool) -> list[Row]:
    """Return the rows of one split file.

    Parameters
    ----------
    path
        UTF-8 CSV with a header of at least `COLUMNS`, each once; further columns are ignored, and rows without any text.
    split
        Name that the rows get.
    where
        The file's name in faults; where it is missing, its whole path stands there.
    same_split
        Whether the split column must say `split` too.

    Raises
    ------
    IcmoeError
        109 where the file is missing, 110 for everything that is wrong inside, all at once.
    """
    reader = csv.DictReader(io.StringIO(_text(path, where), newline=""), strict=True)
    rows: list[Row] = []
    faults: list[Fault] = []
    try:
        reader.fieldnames = _header(reader.fieldnames or (), where)
        for number, fields in enumerate(reader, start=1):
            if _is_blank(fields):
                continue
            try:
                rows.append(_row(fields, split, f"{where} row {number}", same_split=same_split))
            except IcmoeError as error:
                faults.extend(error.faults)
    except csv.Error as error:
        faults.append(_fault(f"{where} line {reader.line_num}", "not readable as CSV", str(error)))
    if faults:
        more = len(faults) - MAX_FAULTS
        rest = [_fault(where, "further rows are faulty as well", str(more))] if more > 0 else []
        raise IcmoeError(*faults[:MAX_FAULTS], *rest)
    return rows


def patients_in_two_splits(rows: Iterable[Row]) -> list[Fault]:
    """Return a fault 107 for each patient of a site that stands in more than one split."""
    splits: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        splits.setdefault((row.site, row.patient), set()).add(row.split)
    return [
        Fault(number=107, where=site, value=f"{patient} in {' and '.join(sorted(names))}", did=NOT_STARTED)
        for (site, patient), names in sorted(splits.items())
        if len(names) > 1
    ]


def spacing_mm(row: Row, *, did: str) -> tuple[float, float, float] | None:
    """Return the distance of neighbouring slices, rows and columns in millimetres; None where all three are empty.

    Raises
    ------
    IcmoeError
        114 where only some are given, or one is not in (0, `MAX_SPACING_MM`].
    """
    if not any(row.spacing):
        return None
    try:
        along_slices, along_rows, along_columns = (float(text) for text in row.spacing)
    except ValueError:
        along_slices = along_rows = along_columns = math.nan
    if not all(0.0 < value <= MAX_SPACING_MM for value in (along_slices, along_rows, along_columns)):
        given = ", ".join(text or "nothing" for text in row.spacing)
        raise IcmoeError(Fault(number=114, where=row.image, value=given, limit=f"above 0 to {MAX_SPACING_MM:g} mm", did=did))
    return (along_slices, along_rows, along_columns)


def place_of(root: Path, relative: str) -> Path:
    """Return where a file or folder lies, whichever way its name's letters are composed; as written where it is not there."""
    if relative.isascii():
        return root / relative
    path = root
    for part in PurePosixPath(relative).parts:
        forms = (path / name for name in (part, *(unicodedata.normalize(form, part) for form in ("NFC", "NFD"))))
        path = next(filter(os.path.lexists, forms), path / part)
    return path


def _text(path: Path, where: str) -> str:
    try:
        return read_regular(path).decode("utf-8-sig")
    except FileNotFoundError:
        raise IcmoeError(Fault(number=109, where=str(path), what="split file is missing", did=NOT_STARTED)) from None
    except OSError as error:
        raise IcmoeError(_fault(where, "split file cannot be opened", error.strerror or "")) from None
    except UnicodeDecodeError as error:
        words = in_utf16(error.object) or {"what": "not a text file in UTF-8", "value": f"byte {error.start}: {error.reason}"}
        raise IcmoeError(Fault(number=110, where=where, did=NOT_STARTED, **words)) from None


def _header(names: Sequence[str], where: str) -> list[str]:
    """Return the names of the columns without the spaces around them, in small letters where no other column has that name.

    Raises
    ------
    IcmoeError
        110 where a column is missing, or stands there twice: nobody knows which of the two is meant.
    """
    plain = [name.strip() for name in names]
    folded = [name if name.lower() in plain else name.lower() for name in plain]
    missing = [column for column in COLUMNS if column not in folded]
    if missing:
        what, value = f"column {', '.join(missing)} is missing", _shown(",".join(names))
        raise IcmoeError(_fault(where, what, value, limit=f"{','.join(COLUMNS)}, with commas between them"))
    twice = [column for column in (*COLUMNS, *SPACING_COLUMNS) if folded.count(column) > 1]
    if twice:
        raise IcmoeError(_fault(where, f"column {', '.join(twice)} stands there more than once", limit="each column once"))
    return folded


def _is_blank(fields: Mapping[str | None, str | Sequence[str] | None]) -> bool:
    """Return whether a row holds no text, such as those that a spreadsheet leaves below a table."""
    return not any("".join(text or ()).strip() for text in fields.values())


def _row(fields: Mapping[str | None, str | Sequence[str] | None], split: str, where: str, *, same_split: bool) -> Row:
    if None in fields or any(fields[column] is None for column in COLUMNS):
        raise IcmoeError(_fault(where, "number of fields differs from the header"))
    texts = {column: str(fields.get(column) or "").strip() for column in (*COLUMNS, *SPACING_COLUMNS)}
    texts |= {column: composed(texts[column]) for column in ("site", "patient")}  # else one patient would be two
    faults = [_fault(where, *problem) for problem in _problems(texts, split if same_split else None)]
    if faults:
        raise IcmoeError(*faults)
    return Row(
        split=split,
        site=texts["site"],
        patient=texts["patient"],
        index=int(texts["slice"]),
        image=str(PurePosixPath(texts["image"])),
        mask=str(PurePosixPath(texts["mask"])),
        spacing=(texts[SPACING_COLUMNS[0]], texts[SPACING_COLUMNS[1]], texts[SPACING_COLUMNS[2]]),
    )


def _problems(texts: Mapping[str, str], split: str | None) -> list[tuple[str, str, str]]:
    """Return what, value and limit of everything that is wrong with one row."""
    empty = [column for column in COLUMNS[1:] if not texts[column]]
    found = [(f"column {column} is empty", "", "") for column in empty]
    if split is not None and texts["split"] != split:
        found.append(("row of another split", _shown(texts["split"]), split))
    if texts["site"] and not _SITE.fullmatch(texts["site"]):
        found.append(("site is not a plain name", _shown(texts["site"]), "letters, digits, space and . _ -, at most 64"))
    if texts["patient"] and not (texts["patient"].isprintable() and len(texts["patient"]) <= 128):
        found.append(("patient is not a plain name", _shown(texts["patient"]), "printable, at most 128 characters"))
    if texts["slice"] and not re.fullmatch(r"-?[0-9]{1,9}", texts["slice"]):
        found.append(("slice is not an integer", _shown(texts["slice"]), "-999999999 to 999999999"))
    return found + [
        (
            f"{column} leaves the data folder",
            _shown(texts[column]),
            "a path below the data folder, with / between its parts and without ..",
        )
        for column in ("image", "mask")
        if texts[column] and not _stays_inside(texts[column])
    ]


def _stays_inside(text: str) -> bool:
    path = PurePosixPath(text)
    # A name from another system: a backslash or a drive letter would be taken as part of a file name here.
    foreign = "\\" in text or re.match(r"[A-Za-z]:", text) is not None
    return text.isprintable() and not foreign and not path.is_absolute() and ".." not in path.parts and path.name != ""


def _shown(text: str) -> str:
    shown = repr(text)
    return shown if len(shown) <= 80 else shown[:77] + "..."


def _fault(where: str, what: str, value: str = "", limit: str = "") -> Fault:
    return Fault(number=110, where=where, what=what, value=value, limit=limit, did=NOT_STARTED)

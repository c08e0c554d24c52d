"""Typed, frozen configuration: TOML at the door, complete objects inside, every fault reported at once."""

from __future__ import annotations

import codecs
import datetime as dt
import difflib
import json
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from icmoe.errors import NOT_STARTED, Fault, IcmoeError
from icmoe.private import read_small

LARGEST_KIB = 1024
"""Of a file of settings; a device or a wrong file ends here, and a pipe that nobody writes to keeps nobody waiting."""


class Section(BaseModel):
    """Base of every configuration section: frozen, strict, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False)


PathText = Annotated[str, Field(pattern=r"^[^\x00]*$")]
"""A path as a file of settings writes it; no file system has a name with a zero byte."""

SectionT = TypeVar("SectionT", bound=BaseModel)


def parse(section: type[SectionT], values: Mapping[str, Any], *, where: str) -> SectionT:
    """Return `values` as a complete `section`.

    Parameters
    ----------
    section
        The configuration class.
    values
        Keys and values as read from TOML or the command line.
    where
        Name of the source, for the fault lines.

    Raises
    ------
    IcmoeError
        With one fault per unknown key, missing key or value outside its range.
    """
    dates: dict[tuple[str, ...], Fault] = {}
    try:
        dates = {path: _no_date(path, value, where) for path, value in _dates(values)}
        # TOML has lists where sections have tuples: JSON mode reads lists as tuples and stays strict otherwise.
        found = section.model_validate_json(json.dumps(values, default=str))
    except RecursionError:
        raise IcmoeError(Fault(number=202, where=where, what="values are nested too deeply", did=NOT_STARTED)) from None
    except ValidationError as error:
        items: list[dict[str, Any]] = [dict(item) for item in error.errors()]
        inner = {item["loc"][:depth] for item in items for depth in range(len(item["loc"]))}
        # A table is also reported for what is wrong inside it; the innermost report says it best.
        told = [item for item in items if item["loc"] not in inner and tuple(map(str, item["loc"])) not in dates]
        raise IcmoeError(*dates.values(), *(_fault(section, item, where) for item in told)) from None
    if dates:
        raise IcmoeError(*dates.values())
    return found


def json_schema(section: type[BaseModel]) -> str:
    """Return the JSON Schema of a file of this section, by which editors complete and check it."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **section.model_json_schema()}
    return json.dumps(schema, indent=1) + "\n"


def read_toml(path: Path) -> dict[str, Any]:
    """Return the tables of a TOML file.

    Raises
    ------
    IcmoeError
        205 where the file cannot be opened or is none of at most 1 MiB, 204 where it is not TOML.
    """
    return parse_toml(read_small(path, LARGEST_KIB), where=str(path))


def parse_toml(data: bytes, *, where: str) -> dict[str, Any]:
    """Return the tables of a TOML file's bytes.

    Raises
    ------
    IcmoeError
        204 where it is not TOML: a number of too many digits, too, or tables nested beyond reading.
    """
    try:
        found = tomllib.loads(data.decode("utf-8-sig"))  # as an editor on Windows writes it
        repr(found)  # tomllib reads hexadecimal numbers of more digits than can be written down again, in a fault for example
    except (ValueError, RecursionError) as error:
        words = in_utf16(data) or {"value": str(error)[:160]}
        raise IcmoeError(Fault(number=204, where=where, did=NOT_STARTED, **words)) from None
    return found


def in_utf16(data: bytes) -> dict[str, str]:
    """Return `what` and `todo` of a fault about a text file in UTF-16, nothing for any other file."""
    if not data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or "\n" not in data.decode("utf-16", errors="ignore"):
        return {}
    todo = "Save it as UTF-8: Notepad asks for the encoding under Save as, PowerShell takes -Encoding utf8."
    return {"what": "file is text in UTF-16, as Windows writes it, not in UTF-8", "todo": todo}


def flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Yield nested settings as dotted keys with their values; an empty table is a value."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def _dates(values: object, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dt.date | dt.time]]:
    """Yield the path and value of each date and time, which TOML makes of what a person forgot to quote."""
    if isinstance(values, dt.date | dt.time):
        yield path, values
    inner = values.items() if isinstance(values, Mapping) else enumerate(values) if isinstance(values, list) else ()
    for key, value in inner:
        yield from _dates(value, (*path, str(key)))


def _no_date(path: tuple[str, ...], value: dt.date | dt.time, where: str) -> Fault:
    limit = f'no date or time; text stands in quotation marks, "{value}"'
    return Fault(number=202, where=where, value=f"{'.'.join(path)} = {value}", limit=limit, did=NOT_STARTED)


def _fault(section: type[BaseModel], item: dict[str, Any], where: str) -> Fault:
    path = [str(part) for part in item["loc"]]
    key = ".".join(path)
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(path[-1], _keys(section, path[:-1]), n=1, cutoff=0.5)
        hint = f'Did you mean "{near[0]}"?' if near else ""
        return Fault(number=201, where=where, value=key, did=NOT_STARTED, todo=hint)
    if item["type"] == "missing":
        return Fault(number=203, where=where, value=key, did=NOT_STARTED)
    given = repr(item["input"])
    shown = given if len(given) <= 80 else given[:77] + "..."
    limit = item["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    of_table = item["type"] == "value_error" and isinstance(item["input"], dict)  # keys that do not fit: the limit names them
    value = key if of_table else f"{key} = {shown}" if key else shown
    return Fault(number=202, where=where, value=value, limit=limit, did=NOT_STARTED)


def _keys(section: type[BaseModel], path: list[str]) -> list[str]:
    """Return the known keys at `path` below `section`, so that a mistyped key finds its nearest."""
    model: Any = section
    for part in path:
        if part.isdigit():
            continue
        field = model.model_fields.get(part)
        kinds = [] if field is None else [field.annotation, *getattr(field.annotation, "__args__", ())]
        model = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        if model is None:
            return []
    return list(model.model_fields)

"""A new study file: a few questions, each answer checked by the study's own schema, every other setting shown as a comment."""

from __future__ import annotations

import json
import secrets
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from icmoe.atomic import write_atomically
from icmoe.backbones import BACKBONES, DEFAULT, choices, file_digest
from icmoe.config import json_schema, parse
from icmoe.errors import Fault, IcmoeError
from icmoe.study import Code, Study, is_digest

SCHEMA_FILE = "study.schema.json"
DID = "Nothing was written."
CODE = '{ scheme = "SCT", value = "85756007", meaning = "Tissue" }'
WIDTH = 118
Answers = dict[str, Any]
Ask = Callable[[str, str, str | None, Callable[[str], Any]], Any]
"""Called with the key, the question, the answer to suggest, and a check that returns the value or raises `IcmoeError`."""

QUESTIONS = (
    ("name", "Short name of the study (a-z, 0-9, - . _)", None),
    ("labels", "Classes besides the background, each with its mask values (lesion=1,255; edema=2)", None),
    ("rounds", "Rounds", "10"),
    ("quorum", "Sites without which a round does not count", "2"),
    ("deadline_s", "Seconds that a round waits for its sites", "3600"),
    ("backbone", f"Backbone ({choices(seeded=False)})", DEFAULT),
    ("weights", "SHA-256 of the backbone's weights, or the path of the file", None),
)


def make_study(given: Mapping[str, str | None], ask: Ask, *, seed: int | None = None) -> Study:
    """Return the study that answers make.

    Parameters
    ----------
    given
        Answers as text by key of `QUESTIONS`, None where not given: these are asked for.
    ask
        Asks one question.
    seed
        Origin of the study's seeds; drawn where None.

    Raises
    ------
    IcmoeError
        201-203 for answers that the schema refuses, 205 for a weights file, 210 for weights of a backbone that brings its
        own, and whatever `ask` raises.
    """
    answers: Answers = {"seed": secrets.randbelow(2**31) if seed is None else seed}
    _require_sound(answers, where="seed")
    faults: list[Fault] = []
    for key, question, suggestion in QUESTIONS:
        name = answers.get("backbone", {}).get("name", DEFAULT)
        if key == "weights" and BACKBONES[name].wheel is not None:
            _require_no_weights(given, name, faults)
            continue
        text = given.get(key)
        try:
            value = _checked(key, text, answers) if text is not None else ask(key, question, suggestion, _checker(key, answers))
            answers = _merged(answers, value)
        except IcmoeError as error:
            faults += error.faults
    if faults:
        raise IcmoeError(*faults)
    return parse(Study, answers, where="new study")


def _require_no_weights(given: Mapping[str, str | None], name: str, faults: list[Fault]) -> None:
    weights = given.get("weights")
    if weights is not None:
        what = f"{name} brings its own weights"
        faults.append(Fault(number=210, where="weights", what=what, value=weights, did=DID, todo="Leave --weights out."))


def _checker(key: str, answers: Answers) -> Callable[[str], Answers]:
    return lambda text: _checked(key, text, answers)


def _merged(answers: Answers, more: Answers) -> Answers:
    both = {**answers, **more}
    if "backbone" in answers and "backbone" in more:
        both["backbone"] = {**answers["backbone"], **more["backbone"]}
    return both


def _checked(key: str, text: str, answers: Answers) -> Answers:
    """Return an answer as values of the study."""
    value = {key: text} if key == "name" else READERS[key](text.strip())
    _require_sound(_merged(answers, value), where=key)
    return value


def _require_sound(answers: Answers, *, where: str) -> None:
    """Let the schema check the answers; what is not answered yet does not count against them."""
    filled = {"name": "x", "labels": _labels("x=1"), **answers}
    filled["backbone"] = {"digest": "0" * 64, **answers.get("backbone", {})}
    parse(Study, filled, where=where)


def _labels(text: str) -> list[dict[str, Any]]:
    labels: list[dict[str, Any]] = [{"name": "background", "values": [0]}]
    for part in filter(str.strip, text.split(";")):
        name, _, values = part.partition("=")
        labels.append({"name": name.strip(), "values": [_number(value) for value in values.split(",") if value.strip()]})
    return labels


def _number(text: str) -> int | float | str:
    """Return a number, or the text for the schema to refuse."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text.strip()


def _backbone(text: str) -> Answers:
    wheel = BACKBONES[text].wheel if text in BACKBONES else None
    return {"backbone": {"name": text, **({"digest": wheel.digest} if wheel is not None else {})}}


def _weights(text: str) -> Answers:
    path = Path(text).expanduser()
    if not is_digest(text) and not path.is_file():
        limit = "64 hexadecimal digits, or a file"
        raise IcmoeError(Fault(number=205, where="weights", value=text, limit=limit, did=DID))
    return {"backbone": {"digest": text if is_digest(text) else file_digest(path)}}


READERS: dict[str, Callable[[str], Answers]] = {
    "labels": lambda text: {"labels": _labels(text)},
    "rounds": lambda text: {"rounds": _number(text)},
    "quorum": lambda text: {"quorum": _number(text)},
    "deadline_s": lambda text: {"deadline_s": _number(text)},
    "backbone": _backbone,
    "weights": _weights,
}


def require_new(path: Path, *, force: bool) -> None:
    """Refuse to overwrite a file before anything is asked.

    Raises
    ------
    IcmoeError
        220 where it is there and `force` is off, or where it is no file.
    """
    if path.exists() and not (force and path.is_file()):
        raise IcmoeError(Fault(number=220, where=str(path), did=DID))


def write_study(study: Study, path: Path) -> None:
    """Write the study as commented TOML, and beside it the schema that an editor completes from."""
    write_atomically(path.parent / SCHEMA_FILE, json_schema(Study).encode())
    write_atomically(path, study_toml(study).encode())


def study_toml(study: Study) -> str:
    """Return the study as TOML: what differs from a default as it is, what does not as a comment, with what each key means."""
    head = [
        f"#:schema ./{SCHEMA_FILE}",
        "# A study as the coordinator proposes it and every site approves it, by its digest: fl_server check FILE.",
        "# A line that starts with # shows a default; take the # away to change it.",
        "",
    ]
    return "\n".join(head + _lines(study)) + "\n"


def _lines(section: BaseModel, path: str = "") -> list[str]:
    fields = type(section).model_fields
    plain = [(name, field) for name, field in fields.items() if not _tables(getattr(section, name))]
    lines = [line for name, field in plain for line in _entry(name, field, getattr(section, name))]
    for name, field in fields.items():
        for table in _tables(getattr(section, name)):
            many = isinstance(getattr(section, name), tuple)
            lines += ["", *_comment(field), f"[[{path}{name}]]" if many else f"[{path}{name}]", *_lines(table, f"{path}{name}.")]
    return lines


def _tables(value: object) -> list[BaseModel]:
    several = value if isinstance(value, tuple) else (value,)
    return [one for one in several if isinstance(one, BaseModel)]


def _entry(name: str, field: FieldInfo, value: object) -> list[str]:
    default = field.default
    if value is None:
        shown = f" = {CODE}" if Code in get_args(field.annotation) else ": absent; fl_server schema study names its keys"
        return [*_comment(field), f"# {name}{shown}"]
    line = f"{name} = {json.dumps(value)}"  # the numbers, texts, lists and truth values of JSON are TOML
    return [*_comment(field), line if field.is_required() or value != default else f"# {line}"]


def _comment(field: FieldInfo) -> list[str]:
    text = " ".join((field.description or "").split())
    return [f"# {line}" for line in textwrap.wrap(text, WIDTH)]

"""`python -m simulations.reference`: deploy/reference.md, made of the command trees, the schemas and the catalogue of errors.

`--check` writes nothing and ends with exit code 1 where the page is not what the code says. Nothing here depends on the width
of a terminal or on the machine.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import click
import typer
from pydantic import BaseModel
from typer.main import get_command

from fl_client.cli import app as fl_client
from fl_client.site import SiteFile
from fl_server.cli import app as fl_server
from fl_server.consortium import Consortium
from icmoe.atomic import write_atomically
from icmoe.cli import app as icmoe
from icmoe.config import json_schema
from icmoe.errors import CATALOGUE
from icmoe.study import Study
from icmoe.usage import OneCommand, restore_help
from simulations.ablation import app as ablation
from simulations.evidence.__main__ import app as evidence
from simulations.evidence.privacy import app as privacy
from simulations.evidence.rivals.__main__ import app as rivals
from simulations.run_sim import app as run_sim
from simulations.scenario import Simulation

PAGE = Path(__file__).resolve().parents[1] / "deploy" / "reference.md"
FILES: dict[str, tuple[str, type[BaseModel]]] = {
    "The study file": ("fl_server schema study", Study),
    "The consortium file": ("fl_server schema consortium", Consortium),
    "The site file": ("fl_client schema", SiteFile),
    "[simulation] of a scenario file": ("", Simulation),
}
RANGES = {1: "data", 2: "study and configuration", 3: "network and deployment", 4: "privacy", 5: "server and runs"}
HEAD = """# Reference

Made from the code by `python -m simulations.reference`; do not edit it. What to type when stands in the guides:
[hospital](hospital.md), [coordinator](coordinator.md), [researcher](../simulations/researcher.md).
"""
PLURALS = {"text": "texts", "whole number": "whole numbers", "number": "numbers"}
TYPES = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true or false", "object": "table"}
BOUNDS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "above {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "below {}",
    "multipleOf": "a multiple of {}",
    "minItems": "{} or more of them",
    "maxItems": "{} or fewer of them",
    "pattern": "`{}`",
}


def programs() -> dict[str, click.Command]:
    """Return every program of the documentation with its tree of commands, by what is typed."""
    apps = {
        "fl_client": fl_client,
        "fl_server": fl_server,
        "icmoe": icmoe,
        "simulations/run_sim.py": run_sim,
        "simulations/ablation.py": ablation,
        "simulations.evidence": evidence,
        "simulations.evidence.rivals": rivals,
        "simulations.evidence.privacy": privacy,
        "simulations.reference": app,
    }
    return {name: get_command(found) for name, found in apps.items()}


def page() -> str:
    """Return the whole page."""
    return "\n".join([HEAD, *_commands(), *_files(), *_errors()])


def _commands() -> Iterator[str]:
    for name, program in programs().items():
        typed = name if name.startswith(("fl_", "icmoe")) else f"python {'-m ' * ('/' not in name)}{name}"
        yield from _command(typed, program, "##")
        if isinstance(program, click.Group):
            for word, command in program.commands.items():
                yield from _command(f"{typed}{' --site NAME' * (name == 'fl_client')} {word}", command, "###")


def _command(typed: str, command: click.Command, level: str) -> Iterator[str]:
    yield f"{level} {typed}\n"
    if command.help:
        yield " ".join(command.help.split()) + "\n"
    if parameters := [parameter for parameter in command.params if parameter.name != "help"]:
        restore_help(command)
        rows = ((*_parameter(parameter), _meaning(parameter)) for parameter in parameters)
        yield from _table(("option", "value", "default", "meaning"), rows)


def _meaning(found: click.Parameter) -> str:
    return (getattr(found, "help", None) or "").replace("\\[", "[")  # escaped for the terminal


def _parameter(found: click.Parameter) -> tuple[str, str, str]:
    flag = isinstance(found, click.Option) and found.is_flag
    words = (
        [*found.opts, *found.secondary_opts] if isinstance(found, click.Option) else [found.metavar or str(found.name).upper()]
    )
    default = "required" if found.required else "" if flag and not found.default else _value(found.default)
    return " ".join(f"`{word}`" for word in words), "" if flag else _of_type(found), default


def _of_type(found: click.Parameter) -> str:
    kind, many = found.type, ", repeatable" * found.multiple
    name = {"integer": "whole number", "integer range": "whole number", "float": "number", "float range": "number"}
    text = name.get(kind.name, kind.name)
    if isinstance(kind, click.IntRange | click.FloatRange):
        ends = [f"at least {kind.min}"] * (kind.min is not None) + [f"at most {kind.max}"] * (kind.max is not None)
        text = ", ".join([text, *ends])
    return text + many


def _files() -> Iterator[str]:
    for title, (command, section) in FILES.items():
        yield f"## {title}\n"
        told = f"`{command}` prints this as JSON Schema. " if command else ""
        yield f"{told}What keys demand of each other is not in this list; the commands that read the file say it.\n"
        schema = json.loads(json_schema(section))
        yield from _section(schema, schema.get("$defs", {}), "")


def _section(schema: Mapping[str, Any], known: Mapping[str, Any], header: str) -> Iterator[str]:
    """Yield the table of a section, then those of the sections below it."""
    path = header.strip("[]")
    inner: list[tuple[str, Mapping[str, Any]]] = []
    rows = []
    for key, found in schema["properties"].items():
        name = f"{path}.{key}".lstrip(".")
        choices = [choice for choice in found.get("anyOf", [found]) if choice.get("type") != "null"]
        below = next((name for name in map(_reference, choices) if name), None)
        if below is None:
            default = "required" if key in schema.get("required", ()) else _value(found.get("default"))
            rows.append((f"`{key}`", _kind(choices), default, _allowed(choices), found.get("description", "")))
            continue
        listed = any(choice.get("type") == "array" for choice in choices)
        inner.append((f"[[{name}]]" if listed else f"[{name}]", known[below]))
    if rows:
        yield from (f"### {header}\n", schema.get("description", "") + "\n") if header else ()
        yield from _table(("key", "type", "default", "allowed", "meaning"), rows)
    for name, found in inner:
        yield from _section(found, known, name)


def _reference(schema: Mapping[str, Any]) -> str | None:
    found = schema.get("$ref") or schema.get("items", {}).get("$ref")
    return str(found).rpartition("/")[2] if found else None


def _kind(choices: list[dict[str, Any]]) -> str:
    return " or ".join(dict.fromkeys(_one_kind(choice) for choice in choices))


def _one_kind(schema: Mapping[str, Any]) -> str:
    if schema.get("type") == "array":
        items = schema.get("items") or (schema.get("prefixItems") or [{}])[0]
        kind = _one_kind(items)
        return f"list of {PLURALS.get(kind, kind)}"
    if schema.get("type") == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"table of {_one_kind(schema['additionalProperties'])}"
    return TYPES.get(schema.get("type", ""), str(schema.get("type", "value")))


def _allowed(choices: list[dict[str, Any]]) -> str:
    return "; or ".join(filter(None, (", ".join(_limits(choice)) for choice in choices)))


def _limits(schema: Mapping[str, Any]) -> Iterator[str]:
    if "enum" in schema or "const" in schema:
        yield ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    yield from (text.format(_figure(schema[key])) for key, text in BOUNDS.items() if key in schema)
    if schema.get("type") == "array" and (inner := ", ".join(_limits(schema.get("items") or {}))):
        yield f"each {inner}"


def _figure(value: Any) -> str:  # noqa: ANN401  # a bound or a pattern
    return f"{value:.0f}" if isinstance(value, float) and value.is_integer() else str(value)


def _errors() -> Iterator[str]:
    yield "## Errors\n"
    yield "The exit code is 1 with each, 2 for a mistake on the command line of `fl_client`, `fl_server` and `icmoe`.\n"
    for hundred, about in RANGES.items():
        yield f"### ICM{hundred}xx: {about}\n"
        found = {number: entry for number, entry in CATALOGUE.items() if number // 100 == hundred}
        yield from _table(
            ("number", "what", "what to do"), ((f"ICM{number}", entry.title, entry.remedy) for number, entry in found.items())
        )


def _table(head: tuple[str, ...], rows: Any) -> Iterator[str]:  # noqa: ANN401  # rows of words
    yield "| " + " | ".join(head) + " |"
    yield "| " + " | ".join("---" for _ in head) + " |"
    yield from ("| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in row) + " |" for row in rows)
    yield ""


def _value(value: Any) -> str:  # noqa: ANN401  # any default
    if value is None or value == "":
        return ""
    return f"`{json.dumps(value, default=str)}`" if not isinstance(value, str | Path) else f"`{value}`"


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(cls=OneCommand)
def write(
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit code 1 where the page is old.")] = False,  # noqa: FBT002
) -> None:
    """Write deploy/reference.md from the code."""
    text = page()
    if not check:
        write_atomically(PAGE, text.encode())
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
        sys.stderr.write("deploy/reference.md is not what the code says: python -m simulations.reference\n")
        raise typer.Exit(1)


if __name__ == "__main__":
    app()

"""Whatever is typed wrongly: numbered sentences, an exit code, nothing written, no traceback; and help that helps."""

from __future__ import annotations

import os
import re
from pathlib import Path

import click
import pytest
import typer
from mistakes import PROGRAMS, ROOT, Printed, contents, lay_out, run_apart, run_hemmed_in, run_here, why_not_hemmed_in
from typer.testing import CliRunner
from wrong_inputs import HEAD, TABLE, Wrong, row

PAGE = ROOT / "deploy" / "wrong-inputs.md"
UPDATE = bool(os.environ.get("ICMOE_UPDATE"))
SENTENCE = re.compile(r"(?:\d+ (?:files?|images?): )?(ICM(\d+) .+)")
APART = [wrong for wrong in TABLE if wrong.typed in {"fl_client --sit Alder", "fl_server check nowhere.toml", "run_sim.py demo"}]
seen: dict[str, str] = {}


@pytest.fixture(scope="module")
def place(make_study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    lay_out(folder, make_study())
    return folder


@pytest.fixture(scope="module")
def hemmed_in(place: Path) -> dict[str, Printed]:
    if reason := why_not_hemmed_in():
        pytest.skip(reason)
    (place / "full").mkdir()
    return run_hemmed_in(place, [wrong.typed for wrong in TABLE if wrong.hemmed_in])


def judge(wrong: Wrong, printed: Printed) -> tuple[str, ...]:
    """The sentences that were printed, after a look at them."""
    assert printed.code == wrong.code
    assert not any("Traceback" in line for line in printed.lines)
    found = [match for line in printed.lines if (match := SENTENCE.fullmatch(line))]
    assert tuple(int(match[2]) for match in found) == wrong.numbers
    assert wrong.beside or len(found) == len(printed.lines), printed.lines
    assert wrong.says in "\n".join(match[1] for match in found)
    return tuple(match[1] for match in found)


@pytest.mark.parametrize("wrong", TABLE, ids=lambda wrong: wrong.typed)
def test_a_wrong_input_is_told_by_number_and_writes_nothing(wrong: Wrong, place: Path, in_this_process, request) -> None:
    apart = request.getfixturevalue("hemmed_in") if wrong.hemmed_in else {}
    before = contents(place)
    printed = apart[wrong.typed] if wrong.hemmed_in else run_here(place, wrong.program, wrong.words)
    seen[wrong.typed] = line = row(wrong, judge(wrong, printed))
    after = contents(place)
    assert {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)} <= wrong.leaves
    assert not (place / "new").exists()
    if not UPDATE:
        assert line in PAGE.read_text(encoding="utf-8").splitlines()


def test_the_page_holds_the_table_and_nothing_else() -> None:
    if UPDATE:
        PAGE.write_text(HEAD + "".join(f"{seen[wrong.typed]}\n" for wrong in TABLE), encoding="utf-8")
    text = PAGE.read_text(encoding="utf-8")
    assert text.startswith(HEAD)
    typed = [line.split("`")[1] for line in text.removeprefix(HEAD).splitlines()]
    assert typed == [wrong.typed for wrong in TABLE]


@pytest.mark.parametrize("wrong", APART, ids=lambda wrong: wrong.typed)
def test_a_process_of_its_own_ends_in_the_same_way(wrong: Wrong, place: Path) -> None:
    assert run_apart(place, wrong.program, wrong.words) == run_here(place, wrong.program, wrong.words)


COMMANDS = [
    (program, name)
    for program, (app, _) in PROGRAMS.items()
    for name in ("", *getattr(typer.main.get_command(app), "commands", ()))
]


@pytest.mark.parametrize(("program", "name"), COMMANDS, ids=[" ".join(filter(None, pair)) for pair in COMMANDS])
def test_help_says_what_a_command_does_and_what_each_option_means(program: str, name: str) -> None:
    app, _ = PROGRAMS[program]
    done = CliRunner().invoke(app, [*filter(None, [name]), "--help"], prog_name=program, env={"COLUMNS": "300"})
    assert done.exit_code == 0
    usage, first, *rest = [line.strip() for line in done.output.splitlines() if line.strip()]
    assert usage.startswith(f"Usage: {' '.join(filter(None, (program, name)))}")
    assert len(first.split()) >= 3
    assert first[0].isupper()
    command = typer.main.get_command(app)
    chosen = command.commands[name] if name else command
    assert first.startswith(str(chosen.help).split("\n", maxsplit=1)[0])
    for parameter in chosen.params:
        is_option = isinstance(parameter, click.Option)
        names = [parameter.opts[0]] if is_option else [parameter.name, parameter.metavar or parameter.name]
        rows = [line for line in rest if set(names) & set(line.lstrip("│ *").split()[:1])]
        assert len(rows) == 1, f"{names} has no row"
        assert parameter.help, f"{names} has no help"
        assert str(parameter.help).split()[0].removesuffix(".") in rows[0]

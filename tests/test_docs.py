"""The pages say what is so: their commands exist and work as written, their files are valid, their links lead somewhere."""

from __future__ import annotations

import os
import pty
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from documents import (
    ROOT,
    Block,
    anchors_in,
    blocks_in,
    blocks_of,
    command_lines,
    links_in,
    mistake,
    pages,
    spans_in,
    text_of,
)
from exports import write_series

from fl_client.site import SiteFile
from fl_server.consortium import Consortium
from icmoe.config import Section, parse
from icmoe.profiles import merged, spelled_out
from icmoe.study import Study
from simulations.reference import PAGE, page, programs
from simulations.scenario import read_scenario

PAGES = pages()
BLOCKS = [block for name in PAGES for block in blocks_of(name)]
DEADLINE_S = 600
"""Of one block; all of them take about two minutes on an idle machine."""
TREES = programs()
STARTS = {"fl_client": "fl_client.cli", "fl_server": "fl_server.cli", "icmoe": "icmoe.cli"}


def where(block: Block) -> str:
    return block.where


def test_pages_are_found_with_their_blocks() -> None:
    assert {"README.md", "deploy/hospital.md", "deploy/coordinator.md", "simulations/researcher.md"} <= set(PAGES)
    assert len([block for block in BLOCKS if block.language == "sh"]) > 20


@pytest.mark.parametrize("block", BLOCKS, ids=where)
def test_every_block_is_tagged(block: Block) -> None:
    assert block.fault is None, f"{block.where}: {block.fault}"


@pytest.mark.parametrize(
    ("text", "faulty"),
    [
        ("```sh run\nls\n```\n", False),
        ("```sh not-run: takes a day\nls\n```\n", False),
        ("```text\nls\n```\n", False),
        ("```sh\nls\n```\n", True),
        ("```sh not-run:\nls\n```\n", True),
        ("```\nls\n```\n", True),
        ("words\n\n    ls\n", True),
        ("1. words\n\n       ls\n", True),
    ],
)
def test_an_untagged_block_is_noticed(text: str, faulty: bool) -> None:
    (block,) = blocks_in(text)
    assert (block.fault is not None) is faulty


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "sh"], ids=where)
def test_every_command_exists_with_its_options(block: Block) -> None:
    done = subprocess.run(["/bin/bash", "-n"], input=block.text, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    if not block.tag.startswith("not-run"):
        assert [found for words in command_lines(block.text) if (found := mistake(words, TREES))] == []


@pytest.mark.parametrize("name", [page for page in PAGES if page != "deploy/wrong-inputs.md"])
def test_commands_named_in_a_sentence_exist(name: str) -> None:
    known = {program: set(tree.commands) for program, tree in TREES.items() if isinstance(tree, click.Group)}
    for span in spans_in(text_of(name)):
        found = re.match(r"(fl_server|fl_client|icmoe)((?: --(?:site|config) \S+)*) ([a-z][a-z|-]+)", span)
        for command in found[3].split("|") if found else ():
            assert command in known[found[1]], f"{name}: {span}"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("fl_server chek study.toml", "No such command"),
        ("fl_server check study.toml --jsn", "No such option"),
        ("fl_server check", "Missing"),
        ("fl_server check a.toml b.toml", "one word too many"),
        ("fl_server run study.toml", "Missing"),
        ("fl_client --site NAME approve --help --jsn", "No such option"),
        ("fl_client approve --site NAME STUDY", "No such option"),
        (".venv/bin/python simulations/run_sim.py --sed 3", "No such option"),
        ("python simulations/run_simulation.py", "there is no"),
        ("python -m simulations.evidence lggg --data D --out O", "No such command"),
        ("python -m simulations.evidnce", "there is no"),
    ],
)
def test_a_command_that_does_not_exist_is_noticed(line: str, said: str) -> None:
    assert said in str(mistake(shlex.split(line), TREES))


def test_command_lines_are_read_as_a_shell_reads_them() -> None:
    lines = "a --b 'c d' > file  # words\ne \\\n  f | g && h --i\n# nothing\n"
    assert list(command_lines(lines)) == [["a", "--b", "c d"], ["e", "f"], ["g"], ["h", "--i"]]


def test_a_command_that_exists_is_accepted_with_stand_ins_for_values() -> None:
    for line in ("fl_client --site NAME audit digest 3", "fl_server stop RUN --home DIR", "icmoe --version", "pip install x"):
        assert mistake(shlex.split(line), TREES) is None


@pytest.mark.parametrize("name", PAGES)
def test_links_between_pages_lead_somewhere(name: str) -> None:
    for target in links_in(text_of(name)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (ROOT / name).parent / path if path else ROOT / name
        assert linked.exists(), f"{name}: {target}"
        if anchor:
            assert anchor in anchors_in(linked.read_text(encoding="utf-8")), f"{name}: {target}"


def model_of(file_name: str) -> type[Section]:
    return {"study.toml": Study, "consortium.toml": Consortium}.get(file_name, SiteFile)


def validate(file_name: str, values: dict[str, Any], path: Path) -> None:
    if file_name.startswith("scenario"):
        read_scenario(path, {}, {})
        return
    parse(model_of(file_name), spelled_out(values, where=file_name) if file_name == "study.toml" else values, where=file_name)


@pytest.mark.parametrize("name", PAGES)
def test_files_of_settings_are_valid(name: str, tmp_path: Path) -> None:
    """`toml NAME` is a whole file, `toml part of NAME` belongs into the whole one before it on the page."""
    whole: dict[str, dict[str, Any]] = {}
    for block in blocks_of(name):
        if block.language != "toml":
            continue
        values, file_name = tomllib.loads(block.text), block.tag.removeprefix("part of ")
        assert file_name, f"{block.where}: toml study.toml, consortium.toml, NAME.toml, or part of one"
        if block.tag.startswith("part of "):
            values = merged(whole[file_name], values)
        else:
            whole[file_name] = values
        path = tmp_path / file_name
        path.write_text(block.text)
        validate(file_name, values, path)


def test_the_reference_is_what_the_code_says() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m simulations.reference"


def desk(folder: Path) -> dict[str, str]:
    """Make a working folder with the programs on the path and the tree beside, and return the environment."""
    programs_folder = folder / ".venv" / "bin"
    programs_folder.mkdir(parents=True)
    for name, module in STARTS.items():
        code = f"from {module} import main; main()"
        _executable(programs_folder / name, f'exec {sys.executable} -c {shlex.quote(code)} "$@"')
    _executable(programs_folder / "python", f'exec {sys.executable} "$@"')
    for name in ("simulations", "tests", "deploy"):
        (folder / name).symlink_to(ROOT / name)
    home = {"HOME": str(folder / "home"), "PYTHONPATH": str(ROOT), "COLUMNS": "120", "LC_ALL": "C.UTF-8"}
    (folder / "home").mkdir()
    caches = {"XDG_CONFIG_HOME": str(folder / "home/.config"), "XDG_CACHE_HOME": str(folder / "home/.cache")}
    return {**home, **caches, "PATH": f"{programs_folder}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": ""}


def _executable(path: Path, line: str) -> None:
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)


def put(folder: Path, name: str, text: str) -> None:
    """Write a whole file of settings: a site's where `fl_client` looks for it, with the test's export as its own."""
    path = folder / name if name in {"study.toml", "consortium.toml"} else folder / "home/.config/icmoe/sites" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.replace("/pacs/export", str(folder / "export")))


def typed(text: str, folder: Path, environment: dict[str, str]) -> tuple[int, str]:
    """Run a block in a terminal's stead: whoever is asked says yes."""
    ours, theirs = pty.openpty()
    command = ["/bin/bash", "-e", "-u", "-o", "pipefail", "-c", text]
    try:
        os.write(ours, b"yes\n")
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            stdin=theirs,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
    finally:
        os.close(ours)
        os.close(theirs)
    return done.returncode, done.stdout


def quiet(text: str, folder: Path, environment: dict[str, str]) -> tuple[int, str]:
    """Run a block as a script does: nobody can be asked."""
    return typed(f"exec < /dev/null\n{text}", folder, environment)


def work_through(found: list[Block], folder: Path, environment: dict[str, str]) -> list[str]:
    """Run a page's blocks in their order, with its whole files of settings in between, and return what was printed."""
    told = []
    for block in found:
        if block.language == "toml" and block.tag and not block.tag.startswith("part of "):
            put(folder, block.tag, block.text)
        if (block.language, block.tag) == ("sh", "run"):
            code, output = (typed if " approve study.toml" in block.text else quiet)(block.text, folder, environment)
            assert code == 0, f"{block.where} ended with {code}:\n{output}"
            told.append(output)
    return told


def handed_over(folder: Path, environment: dict[str, str]) -> None:
    """Make what a hospital has at the start: kit and study file, by the coordinator's own page, and an export."""
    work_through(blocks_of("deploy/coordinator.md"), folder, environment)
    (folder / "kit").symlink_to(folder / "consortium/sites/hospitalA/kit")
    for number in range(3):
        write_series(folder / f"export/p{number}", f"patient {number}", slices=2, seed=number)


BEFORE: dict[str, Callable[[Path, dict[str, str]], None]] = {"deploy/hospital.md": handed_over}


@pytest.mark.parametrize("name", [name for name in PAGES if any(block.tag == "run" for block in blocks_of(name))])
def test_the_commands_of_a_page_work_as_written(name: str, tmp_path: Path) -> None:
    environment = desk(tmp_path)
    BEFORE.get(name, lambda *_: None)(tmp_path, environment)
    assert work_through(blocks_of(name), tmp_path, environment)


def test_a_block_that_fails_or_needs_what_is_not_there_is_noticed(tmp_path: Path) -> None:
    environment = desk(tmp_path)
    assert work_through(blocks_in("```sh run\necho a\n```\n\n```sh lint\nfalse\n```\n"), tmp_path, environment) == ["a\n"]
    with pytest.raises(AssertionError, match=r"page\.md:1 ended with 1"):
        work_through(blocks_in("```sh run\nfalse\necho a\n```\n"), tmp_path, environment)

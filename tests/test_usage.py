"""Mistakes on the command line: one numbered sentence, an exit code, no box and no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from fl_client import cli as hospital
from fl_server import cli as coordinator
from icmoe import cli as researcher
from icmoe.usage import run_command
from simulations import ablation
from simulations.benchmarks import __main__ as benchmarks
from simulations.evidence import __main__ as evidence
from simulations.evidence.rivals import __main__ as rivals

MISTAKES: list[tuple[typer.Typer, list[str], int, str]] = [
    (hospital.app, ["--sight", "A"], 201, "--site"),
    (hospital.app, ["--site", "A", "appove", "study.toml"], 201, "'approve'"),
    (hospital.app, ["--site", "A", "approve"], 203, "STUDY"),
    (hospital.app, ["--site", "A", "init", "--kit"], 210, "--kit"),
    (hospital.app, ["--site", "A", "audit", "digest", "last"], 202, "'last' is not a valid integer"),
    (hospital.app, ["--site", "A", "which", "S-1", "S-2"], 210, "S-2"),
    (coordinator.app, ["chek", "study.toml"], 201, "'check'"),
    (coordinator.app, ["list"], 203, "--home"),
    (researcher.app, ["evaluate", "--model", "m"], 203, "--data"),
    (researcher.app, ["evaluate", "--modl", "m"], 201, "--model"),
    (evidence.app, ["lgg", "--data", "d", "--outt", "o"], 201, "--out"),
    (evidence.app, ["table", "--out", "o"], 201, "'tables'"),
    (rivals.app, ["--data", "d", "--out", "o", "--hours", "many"], 202, "--hours"),
    (ablation.app, ["--data", "d", "--round", "5"], 201, "--rounds"),
    (benchmarks.app, ["--onli", "ingest"], 201, "--only"),
]


@pytest.mark.parametrize(("app", "words", "number", "says"), MISTAKES)
def test_a_mistake_is_one_numbered_sentence_with_the_way_to_help(
    app: typer.Typer, words: list[str], number: int, says: str
) -> None:
    done = CliRunner().invoke(app, words, env={"COLUMNS": "400"})
    assert done.exit_code == 2
    (line,) = done.output.splitlines()
    assert line.startswith(f"ICM{number} ")
    assert says in line
    assert line.endswith("--help shows what it takes.")


def test_a_script_of_one_command_says_its_mistakes_alike(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(repeats: int = 3) -> None:
        """Measure."""

    monkeypatch.setattr(sys, "argv", ["measure", "--repeat", "2"])
    with pytest.raises(SystemExit) as ended:
        run_command(measure)
    said = capsys.readouterr().err
    assert (ended.value.code, said.startswith("ICM201 "), "--repeats" in said) == (2, True, True), said


@pytest.mark.parametrize("config", ["nowhere.toml", ".", "closed.toml", "closed.toml/below.toml"])
def test_a_site_file_that_cannot_be_read_is_named(config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "closed.toml").touch(mode=0)
    if config == "closed.toml" and os.geteuid() == 0:  # root may read every file
        monkeypatch.setattr(os, "access", lambda *_: False)
    path = tmp_path / config
    done = CliRunner().invoke(hospital.app, ["--site", "A", "--config", str(path), "show"], env={"COLUMNS": "400"})
    assert done.exit_code in {1, 2}
    (line,) = done.output.splitlines()
    assert line.startswith("ICM205 ")
    assert str(path) in line


@pytest.mark.parametrize(("words", "code"), [(["--version"], 0), (["--site", "A", "show", "--help"], 0), (["--bad"], 2), ([], 2)])
def test_the_program_ends_with_the_code_of_its_command(words: list[str], code: int) -> None:
    command = [sys.executable, "-c", "from fl_client.cli import main; main()", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code
    assert (done.stdout if words != ["--bad"] else done.stderr).strip()
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("module", "words"), [("fl_client", ["--version"]), ("fl_client", ["schema"]), ("fl_server", ["--version"])]
)
def test_what_cannot_be_printed_is_one_numbered_sentence(module: str, words: list[str]) -> None:
    command = [sys.executable, "-c", f"from {module}.cli import main; main()", *words]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr[:7]) == (1, "ICM205 "), done.stderr

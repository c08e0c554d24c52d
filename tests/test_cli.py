"""What the commands print: names as they are or escaped, a numbered sentence for what is wrong, and never a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from predictions import write_random_model
from typer.testing import CliRunner

from fl_server.new_study import study_toml
from icmoe.cli import _print_prediction, _print_scores, app
from icmoe.errors import Fault, IcmoeError
from simulations.phantoms import PhantomSite, write_phantoms
from simulations.scenario import read_scenario

ABOUT = {"method": "[/x] router-aware", "study": "tiny", "seed": 1, "phantoms": True, "test_only": False}
ROW = {"dice": 0.5, "iou": None, "hd95_mm": None, "patients": 1, "images_found": 2, "images_used": 1}


def test_scores_keep_brackets_in_names_of_sites_and_files(capsys: pytest.CaptureFixture[str]) -> None:
    record = {"model": ABOUT, "sites": {"St [/a]": ROW, "St [red]": ROW}, "mean": ROW, "pooled": ROW}
    _print_scores(record, [Fault(number=102, where="[/a] scan[old].png")])
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("[/x] router-aware", "St [/a]", "St [red]", "[/a] scan[old].png"))
    assert "(trained on phantoms)" in printed
    _print_scores(record | {"model": ABOUT | {"phantoms": False, "test_only": True}}, [])
    assert "(for tests only)" in " ".join(capsys.readouterr().out.split())


def test_a_prediction_says_where_it_is(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    _print_prediction({"model": ABOUT, "labels": [], "stacks": [], "passed_over": []}, tmp_path / "out[new]")
    assert f"{tmp_path}/out[new]." in capsys.readouterr().out


def test_a_small_lesion_is_not_printed_as_no_lesion(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    labels = [{"name": name} for name in ("background", "core", "rim", "scar", "cyst")]
    volumes = {"core": 0.041, "rim": 0.0, "scar": 12.34, "cyst": 0.0004}
    stack = {"folder": "001", "frames": 5, "rows": 24, "columns": 25, "volume_ml": volumes}
    _print_prediction({"model": ABOUT, "labels": labels, "stacks": [stack], "passed_over": []}, tmp_path)
    assert [" ".join(("0.041", "0.0", "12.3", "0.0004"))] == [
        " ".join(line.replace("│", " ").split()[5:]) for line in capsys.readouterr().out.splitlines() if "001" in line
    ]


def test_a_cache_that_cannot_be_written_is_a_numbered_sentence(make_study, tmp_path: Path) -> None:
    site = PhantomSite(name="Alder", train_patients=1, val_patients=1, test_patients=1)
    write_phantoms(tmp_path / "data", seed=1, size_px=32, sites=[site])
    model = write_random_model(tmp_path / "m.safetensors", make_study())
    (tmp_path / "file").write_text("no folder")
    words = ["evaluate", "--model", str(model), "--data", str(tmp_path / "data"), "--cache", str(tmp_path / "file/cache")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 1
    assert "ICM205" in done.output
    assert isinstance(done.exception, SystemExit)


def test_a_weights_file_for_a_backbone_without_weights_is_refused(make_study, tmp_path: Path) -> None:
    model, weights = write_random_model(tmp_path / "m.safetensors", make_study()), tmp_path / "weights.pth"
    commands = (
        ["evaluate", "--data", str(tmp_path)],
        ["predict", "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")],
    )
    for words in commands:
        done = CliRunner().invoke(app, [*words, "--model", str(model), "--checkpoint", str(weights)])
        assert (done.exit_code, isinstance(done.exception, SystemExit)) == (1, True)
        assert done.stderr.startswith(f"ICM210 --checkpoint: backbone sam-vit-test takes no weights file: {weights}. ")
    with pytest.raises(IcmoeError, match="ICM210 checkpoint: backbone sam-vit-test takes no weights file"):
        read_scenario(None, {"backbone": {"name": "sam-vit-test"}, "test_only": True}, {"checkpoint": str(weights)})


def program(
    package: str,
    *words: str,
    environment: dict[str, str] | None = None,
    closed: int | None = None,
    output: int = subprocess.PIPE,
    folder: Path | None = None,
) -> tuple[int, str]:
    """Run a program in a process of its own and return its exit code and all that it printed."""
    script = f"import sys; from {package} import main; sys.argv[0] = 'it'; main()"
    command = ["/bin/sh", "-c", f'exec "$@" {closed}>&-' if closed else 'exec "$@"', "sh", sys.executable, "-c", script, *words]
    settings = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), **(environment or {})}
    done = subprocess.run(command, cwd=folder, env=settings, stdout=output, stderr=subprocess.PIPE, timeout=120, check=False)
    return done.returncode, ((done.stdout or b"") + done.stderr).decode()


CLOSED = {
    "icmoe": ("icmoe.cli", "--version"),
    "fl_client": ("fl_client.cli", "schema"),
    "fl_server": ("fl_server.cli", "schema", "study"),
}


@pytest.mark.parametrize("words", CLOSED.values(), ids=CLOSED)
def test_a_closed_standard_output_is_no_fault(words: tuple[str, ...]) -> None:
    assert program(*words, closed=1) == (0, "")


@pytest.mark.parametrize("words", CLOSED.values(), ids=CLOSED)
def test_with_a_closed_standard_error_a_fault_is_told_by_the_exit_code(words: tuple[str, ...]) -> None:
    assert program(words[0], "nosuch", closed=2) == (2, "")


WRITTEN = {
    **CLOSED,
    "help": ("fl_client.cli", "--help"),
    "json": ("fl_server.cli", "check", "study.toml", "--json"),
    "table": ("fl_server.cli", "check", "study.toml"),
}


@pytest.mark.parametrize("words", WRITTEN.values(), ids=WRITTEN)
def test_a_standard_output_without_room_is_one_numbered_sentence(words: tuple[str, ...], make_study, tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text(study_toml(make_study()))
    with Path("/dev/full").open("wb") as full:
        code, printed = program(*words, folder=tmp_path, output=full.fileno())
    assert (code, printed.count("\n")) == (1, 1), printed
    assert printed.startswith("ICM205 ")
    assert "No space left on device" in printed


@pytest.mark.parametrize("words", WRITTEN.values(), ids=WRITTEN)
def test_a_reader_that_has_gone_is_told_nothing(words: tuple[str, ...], make_study, tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text(study_toml(make_study()))
    reading, writing = os.pipe()
    os.close(reading)
    try:
        assert program(*words, folder=tmp_path, output=writing) == (1, "")
    finally:
        os.close(writing)


NEW_STUDY = ("--labels", "lesion=1", "--rounds", "2", "--quorum", "2", "--deadline-s", "60", "--seed", "1", "--name", "a")
POOR = {"ascii": {"PYTHONIOENCODING": "ascii"}, "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}}


@pytest.mark.parametrize("environment", POOR.values(), ids=POOR)
def test_a_name_that_the_terminal_cannot_show_is_escaped(tmp_path: Path, environment: dict[str, str]) -> None:
    path = tmp_path / "für-\U0001f9e0.toml"
    code, printed = program("fl_server.cli", "new-study", str(path), *NEW_STUDY, environment=environment)
    assert (code, path.is_file()) == (0, True)
    assert printed.startswith(f"{tmp_path}/f\\")
    assert "is written: study a" in printed

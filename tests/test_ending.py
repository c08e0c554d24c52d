"""A command that a signal ends puts away what it has half made, and ends by that signal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from predictions import write_random_model

from icmoe.predict.output import staged

PREDICT = """
import os, sys
from icmoe.predict import run
number = int(sys.argv.pop())
segment = run.Prediction.segment
def ended(self, series, folder):
    segment(self, series, folder)
    assert any(folder.rglob("*.png")), "pictures of a patient are there"
    os.kill(os.getpid(), number)
run.Prediction.segment = ended
from icmoe.cli import main
main()
"""


def predict_until(number: int, model: Path, folder: Path) -> int:
    """Let `icmoe predict` be ended by a signal when its pictures are written, and return its exit code."""
    words = ["predict", "--model", str(model), "--input", str(folder / "in.png"), "--output", str(folder / "out"), "--force"]
    command = [sys.executable, "-c", PREDICT, *words, "--format", "png", str(int(number))]
    return subprocess.run(command, timeout=300, check=False, capture_output=True).returncode


def test_a_prediction_that_is_ended_leaves_no_picture_and_the_former_one(make_study, tmp_path: Path) -> None:
    model = write_random_model(tmp_path / "m.safetensors", make_study())
    Image.effect_noise((40, 32), 60).save(tmp_path / "in.png")
    former = tmp_path / "out/prediction.json"
    former.parent.mkdir()
    former.write_text("{}")
    assert predict_until(signal.SIGTERM, model, tmp_path) == -signal.SIGTERM
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.png", "m.safetensors", "out"]
    assert former.read_text() == "{}"


def test_a_prediction_that_is_ended_between_two_names_puts_the_former_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, rename = tmp_path / "out", Path.rename
    out.mkdir()
    (out / "prediction.json").write_text("former")

    def ended(self: Path, target: Path) -> Path:
        moved = rename(self, target)
        if self == out:
            raise KeyboardInterrupt
        return moved

    monkeypatch.setattr(Path, "rename", ended)
    with pytest.raises(KeyboardInterrupt), staged(out) as folder:
        (folder / "prediction.json").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "prediction.json").read_text() == "former"


ASKED = """
import os, signal, sys
from icmoe.ending import unwinding
number = int(sys.argv[1])
signal.signal(number, signal.SIG_DFL)  # a shell has its children in the background ignore some
with unwinding():
    try:
        os.kill(os.getpid(), number)
    finally:
        print("put away", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_a_signal_ends_a_command_after_what_is_to_be_put_away(number: int) -> None:
    done = subprocess.run([sys.executable, "-c", ASKED, str(int(number))], timeout=60, check=False, capture_output=True)
    assert (done.returncode, done.stdout) == (-number, b"put away\n")


MADE_OF_IT = """
import os, signal, sys
from pydantic import BaseModel, model_serializer
from icmoe.ending import unwinding
number = int(sys.argv[1])
signal.signal(number, signal.SIG_DFL)
class Record(BaseModel):
    @model_serializer
    def written(self) -> str:
        os.kill(os.getpid(), number)
        return "whole"
with unwinding():
    Record().model_dump()
"""


def test_what_a_library_makes_of_a_signal_is_no_fault_of_its_own() -> None:
    number = signal.SIGTERM
    done = subprocess.run([sys.executable, "-c", MADE_OF_IT, str(int(number))], timeout=60, check=False, capture_output=True)
    assert (done.returncode, done.stderr) == (-number, b"")


UNDER = """
import os, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_IGN)
import fl_client.dry_run as dry_run
from icmoe.ending import unwinding
with unwinding(), dry_run.passing_folder():
    os.kill(os.getpid(), signal.SIGHUP)
print("went on")
"""


def test_what_nohup_keeps_from_ending_goes_on(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", UNDER], env={**os.environ, "TMPDIR": str(tmp_path)}, timeout=60, check=False, capture_output=True
    )
    assert (done.returncode, done.stdout) == (0, b"went on\n")

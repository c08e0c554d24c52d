"""What `icmoe` prints: names that look like markup as they are, and a numbered sentence where a file cannot be written."""

from __future__ import annotations

from pathlib import Path

import pytest
from predictions import write_random_model
from typer.testing import CliRunner

from icmoe.cli import _print_prediction, _print_scores, app
from icmoe.errors import Fault
from simulations.phantoms import PhantomSite, write_phantoms

ABOUT = {"method": "[/x] router-aware", "study": "tiny", "seed": 1, "phantoms": True, "test_only": False}
ROW = {"dice": 0.5, "iou": None, "hd95_mm": None, "patients": 1, "images_found": 2, "images_used": 1}


def test_scores_keep_brackets_in_names_of_sites_and_files(capsys: pytest.CaptureFixture[str]) -> None:
    record = {"model": ABOUT, "sites": {"St [/a]": ROW, "St [red]": ROW}, "mean": ROW, "pooled": ROW}
    _print_scores(record, [Fault(number=102, where="[/a] scan[old].png")])
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("[/x] router-aware", "St [/a]", "St [red]", "[/a] scan[old].png"))
    assert "(trained on phantoms)" in printed


def test_a_prediction_says_where_it_is(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    _print_prediction({"model": ABOUT, "labels": [], "stacks": []}, tmp_path / "out[new]")
    assert f"{tmp_path}/out[new]." in capsys.readouterr().out


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

"""What `icmoe` prints about names that look like markup: the names themselves, never a traceback."""

from __future__ import annotations

import pytest

from icmoe.cli import _print_prediction, _print_scores
from icmoe.errors import Fault

ABOUT = {"method": "[/x] router-aware", "study": "tiny", "seed": 1, "phantoms": True, "test_only": False}
ROW = {"dice": 0.5, "iou": None, "hd95_mm": None, "patients": 1, "images_found": 2, "images_used": 1}


def test_scores_keep_brackets_in_names_of_sites_and_files(capsys: pytest.CaptureFixture[str]) -> None:
    record = {"model": ABOUT, "sites": {"St [/a]": ROW, "St [red]": ROW}, "mean": ROW, "pooled": ROW}
    _print_scores(record, [Fault(number=102, where="[/a] scan[old].png")])
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("[/x] router-aware", "St [/a]", "St [red]", "[/a] scan[old].png"))
    assert "(trained on phantoms)" in printed


def test_a_prediction_says_where_it_is(capsys: pytest.CaptureFixture[str], tmp_path) -> None:
    _print_prediction({"model": ABOUT, "labels": [], "stacks": []}, tmp_path / "out[new]")
    assert f"{tmp_path}/out[new]." in capsys.readouterr().out

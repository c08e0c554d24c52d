"""A hospital whose clock was ahead for a while and then set back."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from test_client import command, hospital, write_site_file, write_study_file

from fl_client.status import ago

__all__ = ["hospital"]


def test_what_changed_is_told_against_the_last_approval_though_the_clock_was_set_back(
    hospital: Path, make_study, tmp_path: Path
) -> None:
    path, file = write_site_file(tmp_path, hospital), write_study_file(tmp_path / "study.toml", make_study(rounds=7))
    assert command(path, "approve", str(file), "--yes").exit_code == 0
    (kept,) = (tmp_path / "state/approvals").glob("*.json")
    kept.write_text(json.dumps(json.loads(kept.read_text()) | {"approved_at": "2099-01-01T00:00:00+00:00"}))
    for rounds, before in ((8, 7), (9, 8)):
        text = file.read_text().replace(f"rounds = {before}", f"rounds = {rounds}")
        file.write_text(text)
        said = " ".join(command(path, "approve", str(file), "--yes").output.split())
        assert f"│ rounds │ {before} │ {rounds} │" in said.replace("┃", "│")


@pytest.mark.parametrize(
    ("behind", "told"),
    [(0, "0 s ago"), (-20, "0 s ago"), (90, "1 min ago"), (200_000, "2 d ago"), (-9000, "2 h ahead of this clock")],
)
def test_what_was_noted_before_the_clock_was_set_back_is_not_called_new(behind: int, told: str) -> None:
    assert ago(time.time() - behind) == told

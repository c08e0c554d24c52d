"""`fl_server check` finds a promise of privacy that cannot be kept before any hospital is asked, and says what is spent."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from fl_server.cli import app
from fl_server.new_study import study_toml

SERVER = {"delta": 0.001, "sites": 100, "divisor": 100.0}
SITE = {"epsilon": 3.0, "delta": 0.01, "patients": 10, "sample_rate": 0.5, "steps": 2}
UNCOUPLED = {"cap": 1.0, "min_contributors": 1, "shrinkage": False, "balance_step": 0.0}


@pytest.mark.parametrize(
    ("server", "number", "said"),
    [
        ({"epsilon": 1.0, "noise_multiplier": 1.0}, "ICM420", "rounds fit"),
        ({"noise_multiplier": 2.0, "clip_quantile": 0.5, "count_noise": 0.5}, "ICM421", "count_noise"),
    ],
)
def test_a_promise_that_cannot_be_kept_is_found(make_study, tmp_path: Path, server: dict[str, float], number: str, said: str):
    path = tmp_path / "study.toml"
    path.write_text(study_toml(make_study(rounds=20, privacy={"server": SERVER | server}, aggregation=UNCOUPLED)))
    done = CliRunner().invoke(app, ["check", str(path)])
    assert done.exit_code == 1
    assert number in done.output
    assert said in done.output


def test_both_promises_are_told_with_unit_and_delta(make_study, tmp_path: Path):
    path = tmp_path / "study.toml"
    privacy = {"server": SERVER | {"epsilon": 8.0}, "site": SITE}
    path.write_text(study_toml(make_study(rounds=3, privacy=privacy, aggregation=UNCOUPLED)))
    done = CliRunner().invoke(app, ["check", str(path)], env={"COLUMNS": "120"})
    assert done.exit_code == 0, done.output
    assert "at delta 0.01 per patient (add/remove; prv)" in done.output
    assert "at delta 0.001 per site (add/remove; " in done.output
    spent = [float(line.split("epsilon ")[1].split()[0]) for line in done.output.splitlines() if "epsilon " in line]
    assert spent[0] <= 3.0
    assert 7.9 <= spent[1] <= 8.0

"""An ablation's scenario and its continuation, up to where it would train."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from simulations import ablation
from simulations.phantoms import PhantomSite, write_phantoms


def test_an_ablation_takes_the_scenario_as_it_is_and_no_round_for_what_it_is(tmp_path: Path) -> None:
    scenario = tmp_path / "s.toml"
    scenario.write_text('[simulation]\ndata = "nowhere"\nseeds = [-3]\n')
    words = ["--scenario", str(scenario), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(ablation.app, words)
    assert (done.exit_code, "seeds.0 = -3" in done.output) == (1, True), done.output
    scenario.write_text('[simulation]\ndata = "nowhere"\n')
    done = CliRunner().invoke(ablation.app, words)
    assert (done.exit_code, "ICM109" in done.output) == (1, True), done.output
    done = CliRunner().invoke(ablation.app, [*words, "--rounds", "0"])
    assert (done.exit_code, "ICM202" in done.output, "rounds = 0" in done.output) == (1, True, True), done.output


def test_an_ablation_is_not_continued_on_other_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_phantoms(tmp_path / "data", seed=1, sites=(PhantomSite(name="Elm", train_patients=1, val_patients=1, test_patients=1),))
    begun = tmp_path / "out" / ".work" / "run.json"
    begun.parent.mkdir(parents=True)
    begun.write_text(json.dumps({"data": "0" * 64}))
    scenario = tmp_path / "s.toml"
    scenario.write_text('[study]\ntest_only = true\n[study.backbone]\nname = "sam-vit-test"\nimage_size = 32\n')
    words = ["--scenario", str(scenario), "--data", str(tmp_path / "data"), "--only", "full", "--resume"]
    done = CliRunner().invoke(ablation.app, [*words, "--out", str(tmp_path / "out")])
    assert (done.exit_code, "ICM502" in done.output, "differs: data" in done.output) == (1, True, True), done.output

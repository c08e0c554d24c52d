"""An ablation's scenario and its continuation, up to where it would train."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from icmoe.errors import Fault, IcmoeError
from simulations import ablation
from simulations.phantoms import PhantomSite, write_phantoms

ABLATION = [sys.executable, str(Path(__file__).parents[1] / "simulations" / "ablation.py")]
ALL = ("Alder", "Birch", "Cedar", "Dogwood")


def run(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*ABLATION, *options], capture_output=True, text=True, timeout=900, check=False)


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


def test_an_ablation_is_continued_on_its_device_and_with_its_counts_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_phantoms(tmp_path / "data", seed=1, sites=(PhantomSite(name="Elm", train_patients=1, val_patients=1, test_patients=1),))

    def stop(*_: object, **__: object) -> None:
        raise IcmoeError(Fault(number=503))

    monkeypatch.setattr(ablation, "run_jobs", stop)
    scenario, tiny = tmp_path / "s.toml", 'test_only = true\n[study.backbone]\nname = "sam-vit-test"\nimage_size = 32\n'
    words = ["--scenario", str(scenario), "--data", str(tmp_path / "data"), "--only", "full", "--resume"]
    for counts, number in (("true", "ICM503"), ("true", "ICM503"), ("false", "ICM502")):
        scenario.write_text(f"[simulation]\nexact_counts = {counts}\n[study]\n{tiny}")
        done = CliRunner().invoke(ablation.app, [*words, "--out", str(tmp_path / "out")])
        assert (done.exit_code, number in done.output) == (1, True), done.output
    assert "differs: exact counts" in done.output
    assert json.loads((tmp_path / "out" / ".work" / "run.json").read_text())["device"] == "cpu"


def test_methods_of_a_scenario_are_refused_where_they_would_be_passed_over(tmp_path: Path) -> None:
    scenario = tmp_path / "s.toml"
    scenario.write_text('[simulation]\nmethods = ["fedavg"]\n')
    done = CliRunner().invoke(ablation.app, ["--scenario", str(scenario), "--out", str(tmp_path / "out")])
    assert (done.exit_code, "ICM210 simulation.methods" in done.output) == (1, True), done.output
    assert not (tmp_path / "out").exists()


@pytest.fixture
def ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command line of an ablation of two variants that has ended, its .work deleted; nothing is trained."""
    scores = {"full": 0.5, "one view": 0.4}
    monkeypatch.setattr(ablation, "_run", lambda names, *_, **__: {name: [{("Elm", "a"): scores[name]}] for name in names})
    words = ["--out", str(tmp_path / "out"), "--rounds", "3", "--only", "full,one view"]
    assert CliRunner().invoke(ablation.app, words).exit_code == 0
    shutil.rmtree(tmp_path / "out" / ".work")
    return words


def test_the_result_of_an_ablation_is_not_written_over(ended: list[str], tmp_path: Path) -> None:
    kept = (tmp_path / "out" / "ablation.json").read_bytes()
    done = CliRunner().invoke(ablation.app, ended)
    assert (done.exit_code, "ICM502" in done.output, "holds a run already" in done.output) == (1, True, True), done.output
    for changes, told in (
        (["--rounds", "4"], "other rounds"),
        (["--seeds", "2"], "other seeds"),
        (["--unseen"], "other scored on"),
        (["--only", "full"], "other variants: one view"),
    ):
        done = CliRunner().invoke(ablation.app, [*ended, "--resume", *changes])
        assert (done.exit_code, "ICM502" in done.output, told in done.output) == (1, True, True), done.output
    assert (tmp_path / "out" / "ablation.json").read_bytes() == kept
    assert CliRunner().invoke(ablation.app, [*ended, "--resume"]).exit_code == 0
    assert (tmp_path / "out" / "ablation.json").read_bytes() == kept
    (tmp_path / "out" / "ablation.json").write_text("{")
    done = CliRunner().invoke(ablation.app, [*ended, "--resume"])
    assert (done.exit_code, "ICM217" in done.output) == (1, True), done.output


def test_each_variant_is_a_configuration_of_the_same_federation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    scenario, only = tmp_path / "tiny.toml", "full,mask head alone,no block features"
    scenario.write_text('[study]\ntest_only = true\n[study.backbone]\nname = "sam-vit-test"\nimage_size = 64\n')
    options = ["--scenario", str(scenario), "--rounds", "1"]
    done = run(*options, "--only", only, "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out" / "ablation.json").read_text())
    assert (set(record["dice"]), record["scored_on"]) == (set(only.split(",")), "val")
    assert {site: len(dice) for site, dice in record["patients"]["full"][0].items()} == dict.fromkeys(ALL, 1)
    left = run(*options, "--only", "full,one view", "--unseen", "--out", str(tmp_path / "left"))
    assert left.returncode == 0, left.stderr
    record = json.loads((tmp_path / "left" / "ablation.json").read_text())
    assert (set(record["dice"]), record["scored_on"]) == ({"full", "one view"}, "unseen")
    assert {site: len(dice) for site, dice in record["patients"]["full"][0].items()} == {
        "Alder": 7,
        "Birch": 5,
        "Cedar": 4,
        "Dogwood": 2,
    }
    assert len(list((tmp_path / "left" / ".work").glob("*.safetensors"))) == 8  # a model for each variant and site left out
    wrong = run("--only", "no router", "--out", str(tmp_path / "wrong"))
    assert (wrong.returncode, "ICM210" in wrong.stderr) == (1, True)


def test_without_validation_patients_an_ablation_is_refused_before_it_trains(tmp_path: Path) -> None:
    data = tmp_path / "data"
    site = PhantomSite(name="Elm", train_patients=1, val_patients=1, test_patients=1)
    write_phantoms(data, seed=1, sites=(site,), size_px=32)
    header = (data / "splits/val.csv").read_text().splitlines()[0]
    (data / "splits/val.csv").write_text(header + "\n")
    done = CliRunner().invoke(ablation.app, ["--data", str(data), "--out", str(tmp_path / "out")])
    assert (done.exit_code, "ICM108 val" in done.output) == (1, True), done.output


def test_settings_are_moved_where_they_are_asked_for_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[list[str]]()

    def stop(names: list[str], *_: object, **__: object) -> None:
        asked.append(names)
        raise IcmoeError(Fault(number=108))

    monkeypatch.setattr(ablation, "_run", stop)
    for words in ([], ["--only", "t 2,full"]):
        CliRunner().invoke(ablation.app, [*words, "--out", str(tmp_path / "out")])
    assert asked == [list(ablation.PARTS), ["full", "t 2"]]


def test_every_variant_is_a_study_of_its_own(make_study) -> None:
    base = make_study(name="x", backbone={"name": "lite-medsam", "digest": "0" * 64})
    made = [ablation.variant(base, name, seed=1) for name in ablation.VARIANTS]
    assert len({study.digest for study in made}) == len({study.name for study in made}) == len(ablation.VARIANTS)

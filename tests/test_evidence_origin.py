"""Scores are compared, kept and drawn up only where they are of one study, one backbone, one set of data and one training."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from PIL import Image
from test_evidence import rows_of, score
from typer.testing import CliRunner

from icmoe.backbone import Backbone
from icmoe.data.splits import SPLITS
from icmoe.errors import IcmoeError
from icmoe.study import BackboneChoice
from simulations import commit
from simulations.evidence import dealing, patients
from simulations.evidence.__main__ import app
from simulations.evidence.patients import score_run
from simulations.evidence.sites import other_cases
from simulations.evidence.tables import write_tables
from simulations.folder import RunFolder
from simulations.hospitals import find_hospitals
from simulations.phantoms import PhantomSite, write_phantoms
from simulations.scenario import Simulation, read_scenario

HOSPITALS = ("CS", "DU", "HT")
DIGESTS = {f"{name}_digest": name[0] * 64 for name in ("study", "data", "backbone")}


def put(out: Path, name: str, scores: list[dict[str, Any]], **changes: object) -> None:
    (out / name).mkdir(parents=True, exist_ok=True)
    (out / name / "patients.json").write_text(json.dumps({"commit": "c0ffee", **DIGESTS, "scores": scores, **changes}))


def all_of(site: str) -> list[tuple[str, str]]:
    return [(f"{site}-{split}", split) for split in ("train", "val", "test")]


def base_scores() -> list[dict[str, Any]]:
    """Local models of three hospitals on all patients of the others, and what else the first table needs."""
    rows = rows_of(0.03)
    for seed in (1, 2):
        for site in HOSPITALS:
            for at in set(HOSPITALS) - {site}:
                rows += [score("local", seed, site, patient, 0.4, trained_at=at, split=split) for patient, split in all_of(site)]
    return rows


def without(site: str, dice: float = 0.5) -> list[dict[str, Any]]:
    return [score("router-aware", seed, site, patient, dice, split=split) for seed in (1, 2) for patient, split in all_of(site)]


def table(out: Path) -> str:
    return write_tables(out).read_text()


def test_runs_without_a_hospital_are_compared_and_tell_where_they_are_from(tmp_path: Path) -> None:
    put(tmp_path, "lgg-base", base_scores())
    for site in HOSPITALS:
        put(tmp_path, f"lgg-without-{site}", without(site), commit=f"of{site}", data_digest="e" * 64)
    found = table(tmp_path)
    assert "| unseen hospital, mean | +0.100" in found
    for site in HOSPITALS:
        assert f"lgg-without-{site}: Commit `of{site}`, study `ssssssssssss`, data `eeeeeeeeeeee`, " in found
    assert "Not compared" not in found


@pytest.mark.parametrize("other", ["study", "backbone"])
def test_a_run_of_another_study_or_backbone_is_not_compared(other: str, tmp_path: Path) -> None:
    put(tmp_path, "lgg-base", base_scores())
    for site in HOSPITALS:
        put(tmp_path, f"lgg-without-{site}", without(site), **({f"{other}_digest": "f" * 64} if site == "DU" else {}))
    found = table(tmp_path)
    assert f"Not compared with lgg-base: other {other}." in found
    assert "unseen hospital DU:" not in found
    assert "| unseen hospital CS: " in found
    mean = next(line for line in found.splitlines() if "unseen hospital, mean" in line)
    assert mean.startswith("| unseen hospital, mean, DU missing | +0.100"), mean
    assert mean.endswith("| - | - |  |"), "a mean of some hospitals has no bar"


def test_a_run_with_other_patients_of_the_hospital_is_not_compared(tmp_path: Path) -> None:
    put(tmp_path, "lgg-base", base_scores())
    put(tmp_path, "lgg-without-DU", [row for row in without("DU") if row["split"] != "val"])
    found = table(tmp_path)
    assert "Not compared with lgg-base: other patients." in found
    assert "| unseen hospital" not in found


def test_a_mean_has_its_bar_only_where_every_planned_run_is_there(tmp_path: Path) -> None:
    put(tmp_path, "lgg-base", base_scores())
    put(tmp_path, "lgg-without-DU", without("DU"))
    mean = next(line for line in table(tmp_path).splitlines() if "unseen hospital, mean" in line)
    assert mean.startswith("| unseen hospital, mean, CS, HT missing | "), mean
    assert mean.endswith("| - | - |  |")


def test_scores_of_other_data_are_not_compared(tmp_path: Path) -> None:
    put(tmp_path, "lgg-base", base_scores(), scored_data="1:2")
    put(tmp_path, "lgg-without-DU", without("DU"), scored_data="1:3")
    assert "Not compared with lgg-base: other data." in table(tmp_path)


def test_a_stamp_tells_the_commit_that_trained_and_the_one_that_scored(tmp_path: Path) -> None:
    put(tmp_path, "lgg-base", base_scores(), scored_by="beef")
    assert "\nCommit `c0ffee`, scored by `beef`, study `ssssssssssss`, " in table(tmp_path)


@pytest.mark.parametrize(("t", "told"), [(0.5, " (t=0.5)"), (1.0, " (t=1)"), (None, "")])
def test_the_bar_of_the_usage_weights_names_the_exponent_of_the_study(t: float | None, told: str, tmp_path: Path) -> None:
    configuration = {} if t is None else {"configuration": {"study": {"aggregation": {"usage_exponent": t}}}}
    put(tmp_path, "lgg-base", rows_of(0.03), **configuration)
    assert f"\n| router-aware{told} minus FedAvg, mean of sites | " in table(tmp_path)


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A finished run without any method over two phantom hospitals, one of them left out, with the test backbone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = tmp_path / "data"
    hospitals = [PhantomSite(name=name, train_patients=1, val_patients=1, test_patients=1) for name in ("CS", "DU")]
    write_phantoms(data, seed=1, size_px=32, sites=hospitals)
    options = {"test_only": True, "backbone": {"name": "sam-vit-test", "image_size": 32}}
    study, simulation = read_scenario(None, options, {"data": str(data), "held_out": ["DU"]})
    found = find_hospitals(simulation, study, tmp_path / "phantoms")
    results = {
        "created": "2026-01-02",
        "commit": "c0ffee",
        "study_digest": study.digest,
        "data_digest": found.digest(),
        "masks_digest": found.masks_digest(),
        "configuration": {"study": study.model_dump(mode="json"), "simulation": simulation.model_dump(mode="json")},
        "backbone": {"digest": study.backbone.digest},
        "sites": {name: {"slices": {split: len(site.of(split)) for split in SPLITS}} for name, site in found.sites.items()},
        "methods": {},
    }
    folder = RunFolder(tmp_path / "lgg-without-DU")
    folder.root.mkdir()
    folder.results.write_text(json.dumps(results))
    return folder


def change(folder: RunFolder, **changes: object) -> None:
    folder.results.write_text(json.dumps({**json.loads(folder.results.read_text()), **changes}))


@pytest.mark.parametrize("changes", [{"masks_digest": "0" * 64}, {"created": "2026-01-03"}])
def test_scores_of_a_former_training_are_made_again(changes: dict[str, str], trained: RunFolder) -> None:
    kept = score_run(trained, personal=False)
    assert (kept["commit"], kept["created"]) == ("c0ffee", "2026-01-02")
    (trained.root / "patients.json").write_text(json.dumps({**kept, **changes, "scores": ["of a former training"]}))
    assert score_run(trained, personal=False)["scores"] == []
    (trained.root / "patients.json").write_text(json.dumps({**kept, "scores": ["kept"]}))
    assert score_run(trained, personal=False)["scores"] == ["kept"]


def test_scores_name_the_data_of_all_hospitals_also_where_one_was_left_out(trained: RunFolder) -> None:
    everybody = json.loads(trained.results.read_text())["configuration"]["simulation"] | {"held_out": []}
    simulation = Simulation.model_validate_json(json.dumps(everybody))
    study, _ = read_scenario(None, {"test_only": True, "backbone": {"name": "sam-vit-test", "image_size": 32}}, {})
    found = find_hospitals(simulation, study, trained.root / "phantoms")
    assert score_run(trained, personal=False)["scored_data"] == f"{found.digest()}:{found.masks_digest()}"


@pytest.mark.parametrize(("kind", "what"), [("images", "pictures"), ("masks", "masks")])
def test_other_pictures_or_masks_are_other_data_however_many_they_are(kind: str, what: str, trained: RunFolder) -> None:
    path = sorted((trained.root.parent / "data" / "CS" / kind).glob("*.png"))[0]
    pixels = np.array(Image.open(path))
    Image.fromarray(pixels[::-1].copy()).save(path)
    with pytest.raises(IcmoeError, match=f"ICM520 .*{what} ") as caught:
        score_run(trained, personal=False)
    assert "Nothing was scored." in str(caught.value)
    assert not (trained.root / "patients.json").exists()


def test_results_of_a_former_version_name_neither_masks_nor_commit(trained: RunFolder) -> None:
    results = json.loads(trained.results.read_text())
    del results["masks_digest"], results["commit"]
    trained.results.write_text(json.dumps(results))
    assert score_run(trained, personal=False)["commit"] == "unknown"


def ask(trained: RunFolder, data: Path) -> Result:
    words = ["lgg", "--data", str(data), "--out", str(trained.root.parent), "--only", trained.root.name, "--seeds", "1"]
    return CliRunner().invoke(app, words)


@pytest.fixture
def finished(trained: RunFolder) -> RunFolder:
    """The run with the method that its plan asks for, as the command takes it."""
    change(trained, seeds=[1], phantoms=False, methods={"router-aware": {}})
    return trained


@pytest.mark.parametrize(
    ("changes", "told"),
    [({"methods": {"fedavg": {}}}, "other methods"), ({"phantoms": True}, "other data: phantoms")],
)
def test_a_finished_run_of_other_methods_or_of_phantoms_is_refused(
    changes: dict[str, Any], told: str, finished: RunFolder, tmp_path: Path
) -> None:
    change(finished, **changes)
    done = ask(finished, tmp_path / "data")
    assert (done.exit_code, "ICM502" in done.stderr, told in done.stderr) == (1, True, True), done.output
    assert not (tmp_path / "evidence.md").exists()


def test_a_finished_run_is_scored_with_the_data_that_are_named_and_with_no_others(finished: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "data").rename(tmp_path / "moved")
    done = ask(finished, tmp_path / "moved")
    assert done.exit_code == 0, done.output
    assert (finished.root / "patients.json").exists()
    hospitals = [PhantomSite(name=name, train_patients=1, val_patients=1, test_patients=1) for name in ("CS", "DU")]
    write_phantoms(tmp_path / "other", seed=2, size_px=32, sites=hospitals)
    done = ask(finished, tmp_path / "other")
    assert (done.exit_code, "ICM502" in done.stderr, "other data" in done.stderr) == (1, True, True), done.output


def test_the_checkpoint_that_a_run_was_trained_with_is_the_one_that_scores_it(
    trained: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    named, loaded = list[Path | None](), patients.chosen_backbone

    def load(choice: BackboneChoice, *, checkpoint: Path | None, device: torch.device) -> Backbone:
        named.append(checkpoint)
        return loaded(choice, checkpoint=None, device=device)

    monkeypatch.setattr(patients, "chosen_backbone", load)
    results = json.loads(trained.results.read_text())
    results["configuration"]["simulation"]["checkpoint"] = "weights.pth"
    change(trained, configuration=results["configuration"])
    score_run(trained, personal=False)
    assert named == [Path("weights.pth")]


def test_other_cases_of_a_split_file_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dealing, "FOLDER", tmp_path)
    rows = ["A,volume,train", "A,series,train", "D,cut,train", "D,whole,test", "D,absent,test"]
    (tmp_path / "x-one-class.csv").write_text("\n".join(["site,case,split", *rows, ""]))
    files = {
        "A": ["images/volume.nii.gz", "labels/volume.nii.gz", "series/1.dcm"],
        "D": ["images/cut.nii.gz", "labels/whole.nii.gz"],
    }
    for site, names in files.items():
        for name in names:
            for root in (tmp_path / "source", tmp_path / "place" / "exports" / site):
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).write_text(name)
    asked = (tmp_path / "source", "x-one-class", tmp_path / "place")
    (tmp_path / "source" / "images" / "cut.nii.gz").write_text("the copy was cut, as it shall be")
    assert other_cases(*asked) == []
    (tmp_path / "source" / "series" / "1.dcm").write_text("another picture")
    (tmp_path / "source" / "labels" / "whole.nii.gz").unlink()
    assert other_cases(*asked) == ["series", "whole"]


def test_a_copy_in_somebody_elses_repository_has_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "commit.py"
    shutil.copy(commit.__file__, copy)
    (tmp_path / "of-others").write_text("")
    for words in (["init", "-q"], ["add", "of-others"], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    monkeypatch.setattr(commit, "__file__", str(copy))
    assert commit.commit() == "unknown"

"""The evidence on privacy: which runs are asked for, which kept ones count, what is refused before anything is trained."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from simulations.evidence import privacy
from simulations.evidence.privacy import Cohort, Run, missing, recipe_digest, study_of, table_of, wanted
from simulations.phantoms import PhantomSite, write_phantoms

COHORT = Cohort(patients=500, smallest=125, slices=1, sites={})


def run_of(target: float | None, variant: str, seed: int, dice: float = 0.5) -> Run:
    """What is kept of a run of `COHORT`."""
    recipe = recipe_digest(study_of(COHORT, target, variant, seed))
    return Run(500, target, variant, seed, dice, target, 1.0, 60.0, 800.0, recipe_digest=recipe, data_digest=COHORT.digest())


def test_a_run_is_asked_for_once_however_often_it_is_named() -> None:
    assert list(wanted(2, ["base", "sgd", "sgd"])) == list(wanted(2, ["sgd"]))


def test_a_kept_run_counts_where_its_data_and_its_recipe_are_those_asked_for() -> None:
    kept = [run_of(*key) for key in wanted(2, [])]
    assert missing(kept, COHORT, 2, []) == []
    assert missing(kept, COHORT, 3, []) == [(target, "base", 3) for target in (None, 8.0, 3.0, 1.0)]
    for changes in ({"data_digest": "0" * 64}, {"recipe_digest": "0" * 64}, {"data_digest": "", "recipe_digest": ""}):
        assert missing([replace(kept[0], **changes), *kept[1:]], COHORT, 2, []) == [(None, "base", 1)]
    assert missing([replace(run, source="renamed") for run in kept], COHORT, 2, []) == []


def test_the_spread_is_of_one_recipe_on_one_set_of_data() -> None:
    kept = [run_of(8.0, "base", seed, dice=0.1 * seed) for seed in (1, 2)]
    other = [replace(run, dice=0.9, data_digest="f" * 64) for run in kept]
    table = table_of(kept + other)
    cells = [list(column.cells) for column in table.columns]
    assert cells[6] == ["0.150 +-0.071", "0.900 +-0.000"]
    assert cells[10][1].startswith("ffffff ")


def test_what_was_kept_is_read_back_and_nothing_is_trained_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = list[tuple[object, ...]]()

    def train(source: str, cohort: Cohort, target: float | None, variant: str, seed: int, out: Path) -> Run:
        del source, cohort, out
        trained.append((target, variant, seed))
        return run_of(target, variant, seed)

    monkeypatch.setattr(privacy, "one_run", train)
    monkeypatch.setattr(privacy, "phantoms_of", lambda *_: COHORT)
    words = ["--out", str(tmp_path), "--patients", "500", "--seeds", "1", "--variants", "base", "--variants", "sgd,sgd"]
    for _ in range(2):
        done = CliRunner().invoke(privacy.app, words)
        assert done.exit_code == 0, done.output
        assert trained == [(None, "base", 1), (8.0, "base", 1), (3.0, "base", 1), (1.0, "base", 1), (8.0, "sgd", 1)]
    kept = json.loads((tmp_path / "privacy.json").read_text())
    assert kept == [asdict(run_of(*key)) for key in trained]


@pytest.mark.parametrize("patients", ["3", "0", "-4", "7"])
def test_fewer_patients_than_the_hospitals_can_train_on_are_refused(patients: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(privacy.app, ["--out", str(tmp_path / "out"), "--patients", patients])
    assert (done.exit_code, type(done.exception)) == (2, SystemExit), done.output
    assert done.stderr.startswith("ICM202 main: Invalid value for '--patients': "), done.stderr
    assert not (tmp_path / "out").exists()


def test_the_fewest_patients_make_a_private_study() -> None:
    fewest = 2 * privacy.HOSPITALS
    assert study_of(Cohort(fewest, 2, 1, {}), 1.0, "base", 1).privacy.site is not None


def test_a_folder_whose_hospitals_are_all_too_small_is_refused_with_their_sizes(tmp_path: Path) -> None:
    hospitals = [
        PhantomSite(name=name, train_patients=n, val_patients=1, test_patients=1) for name, n in (("Elm", 3), ("Fir", 1))
    ]
    write_phantoms(tmp_path / "data", seed=1, size_px=32, sites=hospitals)
    done = CliRunner().invoke(privacy.app, ["--out", str(tmp_path / "out"), "--data", str(tmp_path / "data")])
    assert (done.exit_code, type(done.exception)) == (1, SystemExit), done.output
    assert done.stderr.startswith("ICM108 data: "), done.stderr
    assert "Elm 3, Fir 1" in done.stderr

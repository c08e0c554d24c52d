"""The evidence: intervals, bars and tables from scores; one command that runs, scores and goes on; made-up sites."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import nibabel
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from icmoe.data.slices import load_mask
from icmoe.data.sources import read_sites
from icmoe.errors import IcmoeError
from simulations.evidence import dealing, sites
from simulations.evidence.__main__ import app
from simulations.evidence.bars import Bar, common_bars, dice_of, difference, lacking, unseen_bars
from simulations.evidence.dealing import SITES, hippocampus_splits, read_split, split_text
from simulations.evidence.intervals import Interval, over_patients, over_seeds
from simulations.evidence.plan import PLANS, SPLITS
from simulations.evidence.tables import bar_table, score_table
from simulations.phantoms import PhantomSite, write_phantoms

ROOT = Path(__file__).resolve().parents[1]
HIPPOCAMPUS = ROOT.parent / "shared" / "data" / "hippocampus-nifti"
GAINS = st.lists(st.floats(-1.0, 1.0), min_size=2, max_size=6)


@given(GAINS)
def test_the_seed_interval_is_students(values: list[float]) -> None:
    found = over_seeds(values)
    half = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571}[len(values)] * stdev(values) / len(values) ** 0.5
    assert found.mean == pytest.approx(fmean(values))
    assert found.high - found.mean == pytest.approx(half, rel=1e-3)  # the table has three decimals
    assert found.mean - found.low == pytest.approx(half, rel=1e-3)


def test_one_seed_has_no_interval_and_none_is_refused() -> None:
    assert over_seeds([0.5]) == Interval(0.5, None, None)
    with pytest.raises(ValueError, match="seed"):
        over_seeds([])
    with pytest.raises(ValueError, match="patient"):
        over_patients({"A": [0.1], "B": []})


@given(st.dictionaries(st.sampled_from("ABC"), GAINS, min_size=1))
def test_the_patient_interval_counts_sites_alike_and_is_students_where_there_is_one(gains: dict[str, list[float]]) -> None:
    found = over_patients(gains)
    assert found.mean == pytest.approx(fmean(fmean(values) for values in gains.values()))
    assert found.mean - found.low == pytest.approx(found.high - found.mean)
    one = next(iter(gains.values()))
    alone, known = over_patients({"A": one}), over_seeds(one)
    assert alone.high - alone.mean == pytest.approx(known.high - known.mean, rel=1e-3, abs=1e-12)


@pytest.mark.parametrize(("spread", "held"), [((1.0, 1.0, 1.0), 0.95), ((0.1, 1.0, 3.0), 0.95)])
def test_over_few_patients_the_interval_holds_the_mean_as_often_as_is_said(spread: tuple[float, ...], held: float) -> None:
    rng, trials = np.random.default_rng(1), 1000
    cases = [
        over_patients({site: list(rng.normal(0.0, wide, size=4)) for site, wide in zip("ABC", spread, strict=True)})
        for _ in range(trials)
    ]
    assert sum(case.low <= 0.0 <= case.high for case in cases) / trials == pytest.approx(held, abs=0.02)


def test_a_site_with_one_patient_leaves_no_interval() -> None:
    assert over_patients({"A": [0.1], "B": [0.1, 0.3]}) == Interval(pytest.approx(0.15), None, None)
    assert "| - |" in bar_table([Bar(question="q", seeds=over_seeds([0.1]), patients=over_patients({"A": [0.1]}))])[2]


def score(
    method: str, seed: int, site: str, patient: str, dice: float, trained_at: str = "", split: str = "test"
) -> dict[str, Any]:
    return {**locals()}


def rows_of(gain: float) -> list[dict[str, Any]]:
    """Two sites with two patients, two seeds: own models are `gain` above local ones, the global one equals pooled."""
    rows = []
    for seed in (1, 2):
        for at, (site, patient) in enumerate([("A", "a"), ("A", "b"), ("B", "c"), ("B", "d")]):
            base = 0.5 + 0.05 * at + 0.01 * seed
            rows += [score(name, seed, site, patient, base) for name in ("router-aware", "pooled")]
            rows += [score("fedavg", seed, site, patient, base - 0.02)]
            rows += [score("local", seed, site, patient, base, trained_at=site)]
            rows += [score("local", seed, site, patient, 0.1, trained_at="AB".replace(site, ""))]
            rows += [score("personalised", seed, site, patient, base + gain, trained_at=site)]
    return rows


@pytest.mark.parametrize(("gain", "met"), [(0.03, [True, True]), (0.0, [True, False]), (-0.02, [False, False])])
def test_bars_follow_from_the_scores_whatever_they_show(gain: float, met: list[bool]) -> None:
    bars = common_bars(rows_of(gain), mean_gain=0.02)
    assert [bar.met for bar in bars] == [*met, True, True, None]
    assert bars[1].seeds.mean == bars[1].patients.mean == pytest.approx(gain)
    assert bars[2].seeds.mean == pytest.approx(1.0)
    assert bars[4].seeds.mean == pytest.approx(0.02)
    assert ["not met" in line for line in bar_table(bars)[2:4]] == [not one for one in met]


def test_each_bar_by_hand_where_sites_and_methods_differ() -> None:
    """One seed; A has three patients, B one, so that a mean of patients is no mean of sites."""
    dice = {  # A's patients, B's
        "router-aware": ([0.6, 0.6, 0.9], [0.5]),
        "fedavg": ([0.5, 0.6, 0.7], [0.55]),
        "pooled": ([0.8, 0.8, 0.8], [0.6]),
        "personalised": ([0.7, 0.7, 0.7], [0.5]),
        "local": ([0.6, 0.6, 0.6], [0.45]),
    }
    rows = [
        score(method, 1, site, f"{site}{at}", value, trained_at=site if method in {"personalised", "local"} else "")
        for method, sites_ in dice.items()
        for site, values in zip("AB", sites_, strict=True)
        for at, value in enumerate(values)
    ]
    rows += [score(method, 1, "A", "of-train", 0.01, split="train") for method in ("router-aware", "pooled")]
    bars = common_bars(rows, mean_gain=0.02)
    # B gains 0.05, A 0.1; all patients 2.6 against 3.0; worst site 0.5 against 0.55; by site (0.1 - 0.05) / 2.
    assert [bar.seeds.mean for bar in bars] == pytest.approx([0.05, 0.075, 2.6 / 3.0, -0.05, 0.025])
    assert [bar.met for bar in bars] == [True, True, False, False, None]


def test_where_pooled_training_finds_nothing_there_is_no_share_of_it_and_the_other_bars_stand() -> None:
    rows = [{**row, "dice": 0.0} if row["method"] == "pooled" and row["seed"] == 2 else row for row in rows_of(0.03)]
    questions = [bar.question for bar in common_bars(rows_of(0.03), mean_gain=0.02)]
    assert [bar.question for bar in common_bars(rows, mean_gain=0.02)] == [words for words in questions if "share" not in words]


def lack(rows: list[dict[str, Any]], method: str, seed: int, patients: str) -> list[dict[str, Any]]:
    return [row for row in rows if (row["method"], row["seed"]) != (method, seed) or row["patient"] not in patients]


@pytest.mark.parametrize("method", ["router-aware", "fedavg", "pooled", "local", "personalised"])
@pytest.mark.parametrize("patients", ["abcd", "cd", "a"])
def test_a_table_says_which_scores_are_missing_and_compares_nothing_then(method: str, patients: str, tmp_path: Path) -> None:
    file = tmp_path / "lgg-base" / "patients.json"
    file.parent.mkdir()
    digests = {f"{name}_digest": "0" * 64 for name in ("study", "data", "backbone")}
    record = {"commit": "c", **digests, "scores": lack(rows_of(0.0), method, 2, patients)}
    file.write_text(json.dumps(record))
    done = CliRunner().invoke(app, ["tables", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    table = (tmp_path / "evidence.md").read_text()
    assert f"missing: {method} with seed 2 ({4 - len(patients)} of 4 test patients).\n" in table
    assert "| question |" not in table
    assert lacking(rows_of(0.0)) == []


def test_the_table_shows_what_a_site_has_of_its_own_at_that_site_alone() -> None:
    lines = {line.split(" | ")[0]: line.split(" | ")[1:4] for line in score_table(rows_of(0.03))}
    assert lines["| each site alone"] == ["0.540", "0.640", "0.590"]
    assert lines["| router-aware, then each site's own model"] == ["0.570", "0.670", "0.620"]


def test_a_seed_that_one_of_the_models_lacks_says_nothing_of_an_unseen_hospital() -> None:
    base = [score("local", seed, "A", "a", 0.4, trained_at="B", split="train") for seed in (1, 2)]
    rows = [score("router-aware", seed, "A", "a", 0.5, split="train") for seed in (1, 2)]
    first = unseen_bars(lack(base, "local", 2, "a"), {"A": rows})
    assert unseen_bars(base, {"A": [*lack(rows, "router-aware", 2, "a"), score("fedavg", 2, "A", "a", 0.5)]}) == first
    assert [bar.seeds.mean for bar in first] == [pytest.approx(0.1)] * 2


def test_a_bar_is_met_where_it_is_just_reached() -> None:
    assert Bar(question="", seeds=Interval(0.5, None, None), bar=0.5).met is True


def test_a_local_model_counts_at_its_own_site_alone() -> None:
    rows = rows_of(0.0)
    assert min(dice_of(rows, "local", 1, own=True).values()) > 0.5
    assert dice_of(rows, "local", 1) == {}
    line = next(line for line in score_table(rows) if "alone" in line)
    assert line.startswith("| each site alone | 0.540 | 0.640 | 0.590 | ")


def test_an_unseen_hospital_is_compared_with_the_best_single_one_in_its_favour() -> None:
    base = [
        score("local", 1, "A", "a", dice, trained_at=site, split="train") for site, dice in (("A", 0.99), ("B", 0.4), ("C", 0.6))
    ]
    bars = unseen_bars(base, {"A": [score("router-aware", 1, "A", "a", 0.66, split="train")]})
    assert [bar.seeds.mean for bar in bars] == [pytest.approx(0.06)] * 2
    assert bars[-1].met is True
    assert unseen_bars(base, {}) == []
    other_seeds = {"A": [score("router-aware", seed, "A", "a", 0.66, split="train") for seed in (1, 2)]}
    assert unseen_bars(base, other_seeds) == bars, "a seed that the single hospitals were not trained with is passed over"
    assert unseen_bars(base, {"A": other_seeds["A"][1:]}) == []


def test_a_difference_pairs_patients() -> None:
    rows = rows_of(0.0)
    seeds, patients = difference(rows, lambda s: dice_of(rows, "router-aware", s), lambda s: dice_of(rows, "fedavg", s))
    assert patients.low == pytest.approx(patients.high) == pytest.approx(0.02)  # every patient gains alike
    assert Bar(question="", seeds=seeds).met is None


@pytest.fixture(scope="module")
def evidence(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The lgg command over three phantom hospitals with the test backbone, one of them left out once."""
    folder = tmp_path_factory.mktemp("evidence")
    hospitals = [PhantomSite(name=name, train_patients=1, val_patients=1, test_patients=2) for name in ("CS", "DU", "HT")]
    write_phantoms(folder / "data", seed=1, size_px=64, sites=hospitals)
    (folder / "tiny.toml").write_text(
        "[study]\nrounds = 1\ntest_only = true\n[study.training]\nlocal_epochs = 1\n"
        '[study.backbone]\nname = "sam-vit-test"\nimage_size = 64\n'
    )
    words = ["lgg", "--data", str(folder / "data"), "--out", str(folder / "out"), "--scenario", str(folder / "tiny.toml")]
    return folder / "out", [*words, "--seeds", "1", "--only", "lgg-base,lgg-without-DU"]


def test_one_command_runs_scores_and_draws_up_the_table_and_then_goes_on(
    evidence: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    out, words = evidence
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    table = (out / "evidence.md").read_text()
    assert "Not run: lgg-without-CS, lgg-without-HT." in table
    assert "Not run: hippocampus-intensity" in table
    assert "unseen hospital DU: router-aware minus the best single hospital's model" in table
    assert table.count("| router-aware, then each site's own model |") == 1

    record = json.loads((out / "lgg-base" / "patients.json").read_text())
    results = json.loads((out / "lgg-base" / "results.json").read_text())
    mine = [row["dice"] for row in record["scores"] if row["method"] == "router-aware" and row["site"] == "CS"]
    assert fmean(mine) == pytest.approx(results["methods"]["router-aware"]["1"]["test"]["sites"]["CS"]["dice"])
    assert record["data_digest"] == results["data_digest"]
    assert {row["split"] for row in record["scores"] if row["trained_at"] == "CS" and row["site"] == "DU"} == {
        "train",
        "val",
        "test",
    }
    unseen = json.loads((out / "lgg-without-DU" / "results.json").read_text())
    assert unseen["sites"]["DU"]["slices"]["train"] == unseen["sites"]["DU"]["slices"]["val"] == 0

    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.json")}
    (out / "evidence.md").unlink()
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 0, again.output
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.json")} == before
    assert (out / "evidence.md").read_text() == table

    (out / "lgg-base" / "patients.json").write_text(json.dumps({**record, "data_digest": "0" * 64, "scores": []}))
    anew = CliRunner().invoke(app, words)
    assert anew.exit_code == 0, anew.output
    assert (out / "evidence.md").read_text() == table, "scores of a former run in the folder are no scores of this one"


def test_a_finished_run_of_other_seeds_or_another_recipe_is_not_taken_for_what_was_asked(
    evidence: tuple[Path, list[str]], tmp_path: Path
) -> None:
    kept = tmp_path / "out" / "lgg-base" / "results.json"
    kept.parent.mkdir(parents=True)
    asked = {name: {"1": {}} for name in PLANS["lgg"].runs[0].methods}
    kept.write_text(json.dumps({"seeds": [1, 2], "study_digest": "0" * 64, "methods": asked, "phantoms": False}))
    words = ["lgg", "--data", str(tmp_path), "--out", str(tmp_path / "out"), "--only", "lgg-base"]
    for options, other in ((["--seeds", "1"], "other seeds"), (["--seeds", "2", "--scenario", evidence[1][6]], "other study")):
        done = CliRunner().invoke(app, [*words, *options])
        assert (done.exit_code, "ICM502" in done.output, other in done.output) == (1, True, True), done.output
    assert not (tmp_path / "out" / "evidence.md").exists()


HEAD = '{"commit": "c", "study_digest": "", "data_digest": "", "backbone_digest": "", "scores": '


@pytest.mark.parametrize("text", ["", "[1]", '{"seeds": [1]}', "\udcff", HEAD + '["a"]}', HEAD + '[{"seed": "1"}]}'])
@pytest.mark.parametrize("name", ["results.json", "patients.json"])
def test_a_damaged_file_of_a_run_is_one_numbered_line(name: str, text: str, tmp_path: Path) -> None:
    file = tmp_path / "out" / "lgg-base" / name
    file.parent.mkdir(parents=True)
    file.write_bytes(text.encode(errors="surrogateescape"))
    command = ["tables"] if name == "patients.json" else ["lgg", "--data", str(tmp_path), "--only", "lgg-base", "--seeds", "1"]
    done = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "out")])
    assert (done.exit_code, type(done.exception)) == (1, SystemExit)
    assert done.stderr.startswith(f"ICM217 {file}: "), done.stderr


@pytest.mark.parametrize("words", [["lgg", "--out", "out", "--only", "lgg-bas"], ["splits"]])
def test_a_wrong_name_and_a_missing_index_are_one_numbered_line(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, [*words, "--data", str(tmp_path)])
    assert (done.exit_code, type(done.exception)) == (1, SystemExit)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "content", ["", "name,split\na,train\n", "name,split,family,vmax,anterior_vox,posterior_vox\na,train,x,\n"]
)
@pytest.mark.parametrize("coding", ["utf-8", "utf-16"])
def test_an_index_of_another_form_writes_no_split(
    content: str, coding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("simulations.evidence.__main__.FOLDER", tmp_path / "splits")
    (tmp_path / "index.csv").write_text(content, encoding=coding)
    done = CliRunner().invoke(app, ["splits", "--data", str(tmp_path)])
    assert done.exit_code == 1
    assert done.stderr.startswith(f"ICM110 {tmp_path / 'index.csv'}: ")
    assert not (tmp_path / "splits").exists()


def test_tables_of_a_folder_that_is_not_there_are_refused_and_none_is_made(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["tables", "--out", str(tmp_path / "nosuch")])
    assert (done.exit_code, type(done.exception)) == (1, SystemExit)
    assert done.stderr.startswith(f"ICM205 {tmp_path / 'nosuch'}: ")
    assert not list(tmp_path.iterdir())
    assert CliRunner().invoke(app, ["tables", "--out", str(tmp_path)]).exit_code == 0


@pytest.mark.parametrize("name", SPLITS)
def test_a_committed_split_deals_every_case_once_and_every_site_can_be_tested(name: str) -> None:
    rows = read_split(f"hippocampus-{name}")
    assert len({row["case"] for row in rows}) == len(rows) == 40
    for site in SITES:
        assert {row["split"] for row in rows if row["site"] == site} == {"train", "val", "test"}
    assert set(rows[0]) == {"site", "case", "split"}


@pytest.mark.real
@pytest.mark.skipif(not HIPPOCAMPUS.exists(), reason="the real hospital images are not here")
def test_the_committed_splits_are_those_that_the_index_gives() -> None:
    with (HIPPOCAMPUS / "index.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for name, dealt in hippocampus_splits(rows).items():
        assert split_text(rows, dealt) == (dealing.FOLDER / f"hippocampus-{name}.csv").read_text()


def test_made_up_sites_are_ingested_and_one_of_them_never_shows_the_second_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    rows = [("A", "case_1", "train"), ("D", "case_2", "train"), ("D", "case_3", "test")]
    for _, case, _ in rows:
        classes = np.zeros((16, 20, 4), np.uint8)
        classes[4:10, 3:8, 1:3], classes[4:10, 8:14, 1:3] = 2, 1
        grey = rng.normal(100, 10, classes.shape) + 60 * classes
        for kind, volume in (("images", grey.astype(np.float32)), ("labels", classes)):
            (tmp_path / "source" / kind).mkdir(parents=True, exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path / "source" / kind / f"{case}.nii.gz")
    (tmp_path / "x-one-class.csv").write_text("site,case,split\n" + "\n".join(",".join(row) for row in rows) + "\n")
    monkeypatch.setattr(dealing, "FOLDER", tmp_path)
    labels = PLANS["hippocampus"].labels
    found = read_sites(sites.made_sites(tmp_path / "source", "x-one-class", labels, tmp_path / "place"), labels)

    def classes_at(site: str, split: str) -> set[int]:
        return {int(value) for item in found[site].of(split) for value in np.unique(load_mask(item.mask, labels))}

    assert classes_at("A", "train") == classes_at("D", "test") == {0, 1, 2}
    assert classes_at("D", "train") == {0, 1}
    (tmp_path / "source" / "images" / "case_3.nii.gz").unlink()
    with pytest.raises(IcmoeError, match="ICM216"):
        sites.made_sites(tmp_path / "source", "x-one-class", labels, tmp_path / "place")

"""The rehearsal's own parts: methods, scenarios, the folder it writes, the sentences it prints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from icmoe.data.slices import SiteData
from icmoe.errors import Fault, IcmoeError
from icmoe.profiles import merged
from icmoe.study import derived_seed
from simulations import run_sim
from simulations.folder import RunFolder
from simulations.hospitals import Hospitals, find_hospitals
from simulations.methods import METHODS, study_for
from simulations.rehearsal import report_sites
from simulations.results import comparisons, summary_of
from simulations.run_sim import _given, _seeds
from simulations.scenario import Simulation, read_scenario
from simulations.scoring import best_median_worst, mean_record, require_unchanged
from simulations.screen import Screen, final_table

TEST_BACKBONE = {"test_only": True, "backbone": {"name": "sam-vit-test", "image_size": 64}}


def test_methods_differ_in_what_they_say_and_in_nothing_else(make_study) -> None:
    base = make_study()
    studies = {method: study_for(method, base, seed=5) for method in METHODS}
    assert studies["local"] == studies["pooled"]
    assert len({study.digest for study in studies.values()}) == len(METHODS) - 1
    assert all(study.seed == 5 and study.model == base.model and study.loss == base.loss for study in studies.values())
    assert len({derived_seed(study, "train", "Alder", 1) for study in studies.values()}) == 1  # the same batches for all
    plain = studies["fedavg"].aggregation
    assert (plain.usage_exponent, plain.floor, plain.cap, plain.shrinkage, plain.min_contributors) == (0.0, 0.0, 1.0, False, 1)
    assert studies["fedprox"].training.proximal_mu > 0
    assert studies["personal"].aggregation.personal
    assert studies["fedyogi"].aggregation.optimizer == "yogi"
    assert studies["router-aware"].aggregation == base.aggregation


def test_references_that_never_leave_a_site_have_no_privacy(make_study) -> None:
    promise = {"site": {"epsilon": 3.0, "delta": 1e-2, "patients": 20, "sample_rate": 0.2, "steps": 10}}
    base = make_study(privacy=promise)
    assert study_for("fedavg", base, seed=5).privacy == base.privacy
    assert study_for("local", base, seed=5).privacy.site is None


def test_what_a_site_does_not_show_is_background_where_nobody_else_teaches_it(make_study):
    said = {method: study_for(method, make_study(), seed=5).training.untaught for method in METHODS}
    assert {method for method, value in said.items() if value == "background"} == {"local", "pooled"}


def test_a_scenario_is_read_with_the_command_line_on_top(tmp_path: Path) -> None:
    path = tmp_path / "s.toml"
    path.write_text(
        '[study]\nrounds = 7\ntest_only = true\n[study.backbone]\nname = "sam-vit-test"\nimage_size = 64\n'
        "[simulation]\nseeds = [4, 5]\n"
    )
    study, simulation = read_scenario(path, {"training": {"local_epochs": 9}}, {"methods": ["fedavg"]})
    assert (study.rounds, study.training.local_epochs, study.seed) == (7, 9, 4)
    assert simulation.seeds == (4, 5)
    assert simulation.methods == ("fedavg",)


def test_the_seed_of_a_study_is_the_one_that_is_run_unless_seeds_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "s.toml"
    path.write_text("[study]\nseed = 5\n")
    assert read_scenario(path, TEST_BACKBONE, {})[1].seeds == (5,)
    assert read_scenario(path, TEST_BACKBONE, {"seeds": [2, 3]})[1].seeds == (2, 3)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("[simulatoin]\nseeds = [1]\n", 201),
        ("[simulation]\nmetods = []\n", 201),
        ("[simulation]\nseeds = []\n", 202),
        ("[simulation]\nseeds = [1, 1]\n", 202),
        ('[simulation]\nmethods = ["fedavg", "fedavg"]\n', 202),
        ("[simulation]\nalpha = 0.0\n", 202),
        ("simulation = 3\n", 202),
        ("[[study]]\nrounds = 1\n", 202),
        ('[study.backbone]\nname = ["sam-vit-test"]\n', 202),
        ('[simulation]\ndata = "a\\u0000b"\n', 202),
        ("[study\n", 204),
    ],
)
def test_a_wrong_scenario_is_refused_by_number(text: str, number: int, tmp_path: Path) -> None:
    path = tmp_path / "s.toml"
    path.write_text(text)
    with pytest.raises(IcmoeError) as caught:
        read_scenario(path, {} if "[study.backbone]" in text else TEST_BACKBONE, {})
    assert caught.value.faults[0].number == number


def test_every_fault_of_a_scenario_is_told_at_once(tmp_path) -> None:
    path = tmp_path / "s.toml"
    path.write_text("[simulatoin]\n[study]\nronds = 3\n[simulation]\nalpha = -1.0\n")
    with pytest.raises(IcmoeError) as caught:
        read_scenario(path, TEST_BACKBONE, {})
    assert [fault.number for fault in caught.value.faults] == [201, 202, 201]


def test_tables_are_merged_value_by_value() -> None:
    assert merged({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"c": 4}, "e": 5}) == {"a": {"b": 1, "c": 4}, "d": 3, "e": 5}


def test_options_that_were_not_given_stay_out() -> None:
    assert _given({"a": None, "b": {}, "c": 0, "d": "x"}) == {"c": 0, "d": "x"}
    assert _seeds(None, 3) == [1, 2, 3]
    assert _seeds(7, None) == [7]
    assert _seeds(None, None) is None
    for wrong in ((1, 2), (None, 0), (None, 101)):
        with pytest.raises(IcmoeError):
            _seeds(*wrong)


def test_a_folder_belongs_to_one_run_at_a_time(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "out")
    with folder.claimed(resume=False):
        with pytest.raises(IcmoeError, match="another process"), RunFolder(tmp_path / "out").claimed(resume=True):
            pass
        folder.check_identity({"data": "x", "studies": "y"})
    with pytest.raises(IcmoeError, match="holds a run already"), folder.claimed(resume=False):
        pass
    with folder.claimed(resume=True):
        folder.check_identity({"data": "x", "studies": "y"})
        with pytest.raises(IcmoeError, match=r"ICM502.*data"):
            folder.check_identity({"data": "other", "studies": "y"})
        for damaged in ("", "{", "3"):
            (folder.work / "run.json").write_text(damaged)
            with pytest.raises(IcmoeError, match=r"ICM502.*run\.json"):
                folder.check_identity({"data": "x", "studies": "y"})


def test_who_continues_where_there_is_no_run_is_told_that_one_begins(tmp_path: Path) -> None:
    words = ["--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out"), "--resume"]
    done = CliRunner().invoke(run_sim.app, words, env={"COLUMNS": "500"})
    assert f"{tmp_path / 'out'} holds no run to continue: a new one begins.\n" in done.output
    assert (done.exit_code, "ICM109" in done.output) == (1, True)
    folder = RunFolder(tmp_path / "out")
    with folder.claimed(resume=True):
        assert folder.new_though(resume=True) != ""
        folder.check_identity({"data": "x"})
        assert folder.new_though(resume=True) == ""
    shutil.rmtree(folder.work)
    assert (folder.new_though(resume=True) == "", folder.new_though(resume=False)) == (False, "")
    folder.results.touch()
    assert folder.new_though(resume=True) == ""


def draw_and_refuse(folder: RunFolder, refusal: Exception) -> None:
    with folder.claimed(resume=False):
        folder.phantoms.mkdir(exist_ok=True)
        raise refusal


@pytest.mark.parametrize("refusal", [IcmoeError(Fault(number=202)), OSError("ICM202, the cache's disk is full")])
@pytest.mark.parametrize("before", [False, True])
def test_a_refused_start_takes_its_own_phantoms_along_and_no_others(before: bool, refusal: Exception, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "out")
    if before:
        folder.phantoms.mkdir(parents=True)
    with pytest.raises(type(refusal), match="ICM202"):
        draw_and_refuse(folder, refusal)
    assert folder.phantoms.exists() == before
    assert not folder.work.exists()


@pytest.mark.parametrize("other", [{"phantom_seed": 8}, {"image_size": 64}])
def test_phantoms_of_another_seed_or_size_are_not_taken_for_what_was_asked(other: dict[str, int], make_study, tmp_path: Path):
    root, backbone = tmp_path / "phantoms", make_study().backbone.model_dump()
    study = make_study(backbone={**backbone, "image_size": 32})
    before = find_hospitals(Simulation(phantom_seed=7), study, root).digest()
    assert find_hospitals(Simulation(phantom_seed=7), study, root).digest() == before
    study = make_study(backbone={**backbone, "image_size": other.get("image_size", 32)})
    with pytest.raises(IcmoeError, match=r"ICM502 .*phantoms: phantoms of another seed or size are there"):
        find_hospitals(Simulation(phantom_seed=other.get("phantom_seed", 7)), study, root)


def test_results_appear_last(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "out")
    staged = folder.root / ".work" / "publish"
    for name in ("results.json", "report.html", "models/a.safetensors"):
        (staged / name).parent.mkdir(parents=True, exist_ok=True)
        (staged / name).write_text(name)
    (folder.root / "models").mkdir()
    (folder.root / "models" / "a.safetensors").mkdir()  # a model cannot be put in place
    with pytest.raises(OSError, match="directory"):
        folder.publish(staged)
    assert not folder.results.exists()
    (folder.root / "models" / "a.safetensors").rmdir()
    folder.publish(staged)
    assert folder.results.read_text() == "results.json"
    assert not staged.exists()


def row(dice: float | None, **extra: object) -> dict[str, object]:
    return {"dice": dice, "iou": None, "hd95_mm": None, **extra}


def evaluation(a: float, b: float, pooled: float) -> dict[str, object]:
    worst, value = ("A", a) if a < b else ("B", b)
    return {
        "sites": {"A": row(a), "B": row(b), "Tiny": row(None)},
        "mean": row((a + b) / 2),
        "worst_site": {"site": worst, "dice": value},
        "pooled": row(pooled, patients=3),
    }


def test_the_mean_of_records_is_taken_number_by_number_and_null_stays_null() -> None:
    mean = mean_record([evaluation(0.2, 0.9, 0.5), evaluation(0.8, 0.1, 0.3)])
    assert mean["sites"]["A"]["dice"] == pytest.approx(0.5)
    assert mean["sites"]["Tiny"]["dice"] is None
    assert mean["pooled"] == pytest.approx({"dice": 0.4, "iou": None, "hd95_mm": None, "patients": 3})
    assert mean["worst_site"] == {"site": "A", "dice": pytest.approx(0.5)}


def test_the_printed_answers_follow_from_the_numbers_whatever_they_show() -> None:
    def record(test: dict[str, object], **extra: object) -> dict[str, object]:
        return {"test": test, "rounds": [{"usage_spread": 0.5}, {"usage_spread": 0.01}], "own_test": None, **extra}

    methods = {
        "router-aware": {"1": record(evaluation(0.6, 0.7, 0.65)), "2": record(evaluation(0.6, 0.7, 0.67))},
        "fedavg": {"1": record(evaluation(0.6, 0.7, 0.66)), "2": record(evaluation(0.6, 0.7, 0.66))},
        "pooled": {seed: record(evaluation(0.7, 0.7, 0.70)) for seed in "12"},
        "local": {
            seed: record(
                evaluation(0.5, 0.6, 0.55), own_test=evaluation(0.65, 0.6, 0.6), everywhere={"A": 0.64, "B": 0.62, "Tiny": 0.2}
            )
            for seed in "12"
        },
    }
    for run in methods["local"].values():
        run["own_test"] = run.pop("own_test")
    summary = {name: summary_of(list(runs.values())) for name, runs in methods.items()}
    page = (Path(__file__).parents[1] / "simulations" / "README.md").read_text()
    (line,) = (line for line in page.splitlines() if line.startswith("| `summary.METHOD`"))
    assert [key for key in summary["local"] if f"`{key}" not in line] == [], "every key is documented"
    assert summary["router-aware"]["dice_pooled"] == pytest.approx(0.66)
    assert summary["router-aware"]["dice_std"] == pytest.approx(0.01414, abs=1e-4)
    assert summary["router-aware"]["dice_mean"] == pytest.approx(0.65)
    assert summary["router-aware"]["dice_worst_site"] == pytest.approx(0.6)
    found = comparisons(summary, methods, usage_exponent=1.0)
    assert json.loads(json.dumps(found)) == found
    pooled, local, honest, *sites, usage = found
    assert pooled["value"] == pytest.approx(0.66 / 0.70)
    assert pooled["met"] is False
    assert local["value"] == pytest.approx(0.11)
    assert local["met"] is True
    assert honest["value"] == pytest.approx(0.66 - 0.63)  # without the site that is too small to test on
    assert [line["sentence"].split()[:2] for line in sites] == [["A", "loses"], ["B", "gains"]]
    assert [line["value"] for line in sites] == pytest.approx([0.6 - 0.65, 0.7 - 0.6])
    assert [line["bar"] for line in (pooled, local, honest)] == [0.95, 0.03, 0.03]
    assert usage["sentence"].endswith("usage differs between sites by 0.010")  # in the last round
    assert usage["sentence"].startswith("usage weights (t=1) change Dice by ")
    half = comparisons(summary, methods, usage_exponent=0.5)[-1]["sentence"]
    assert half.startswith("usage weights (t=0.5) change Dice by "), "the study's exponent, whatever it is"
    assert usage["value"] == pytest.approx(0.0, abs=1e-9)
    assert "+0.0000" in usage["sentence"] or "-0.0000" in usage["sentence"]


def test_a_sites_own_model_is_compared_with_its_local_one_at_the_site_that_gains_least() -> None:
    def runs(a: float, b: float) -> dict[str, dict[str, object]]:
        own = evaluation(a, b, (a + b) / 2)
        return {"1": {"test": own, "own_test": own, "everywhere": {"A": a, "B": b, "Tiny": None}, "rounds": []}}

    methods = {"personalised": runs(0.60, 0.75), "local": runs(0.62, 0.70)}
    summary = {name: summary_of(list(by_seed.values())) for name, by_seed in methods.items()}
    least, mean = comparisons(summary, methods, usage_exponent=1.0)
    assert "gains least over its local model is A, -0.020 Dice" in least["sentence"]
    assert (least["value"], least["bar"], least["met"]) == (pytest.approx(-0.02), -0.01, False)
    assert (mean["value"], mean["bar"], mean["met"]) == (pytest.approx(0.015), 0.02, False)


def test_the_printed_table_shows_a_spread_of_zero_and_marks_rows_of_some_sites_alone() -> None:
    def row(dice: float | None, std: float | None) -> dict[str, object]:
        per_site = {"A": {"mean": 0.5, "std": std}, "B": {"mean": dice, "std": std}}
        means = {"dice_mean": 0.5, "dice_mean_std": std, "dice_worst_site": 0.5, "dice_pooled": 0.5, "dice_std": std}
        return {"per_site": per_site, **means}

    results = {"sites": {name: {"patients": {"test": 1}} for name in "AB"}, "summary": {"pooled": row(0.5, 0.0)}}
    assert final_table(results).caption is None
    results["summary"]["personalised"] = row(None, None)
    table = final_table(results)
    assert [next(iter(column.cells)) for column in table.columns][1:3] == ["0.500 ±0.000"] * 2
    assert str(table.caption).startswith("personalised: of the scored sites alone")


def test_a_backbone_that_changed_stops_everything() -> None:
    require_unchanged("a", "a")
    with pytest.raises(IcmoeError, match="ICM401"):
        require_unchanged("a", "b")


def test_best_median_worst_of_few_patients() -> None:
    from icmoe.metrics import ClassScore, PatientScore

    patients = [
        PatientScore("A", name, (ClassScore(dice, dice, None, None),)) for name, dice in (("x", 0.9), ("y", 0.1), ("z", 0.5))
    ]
    assert [(rank, patient.patient) for rank, patient in best_median_worst(patients)] == [
        ("best", "x"),
        ("median", "z"),
        ("worst", "y"),
    ]
    assert best_median_worst([]) == []


def test_a_rehearsal_keeps_brackets_in_names_and_in_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    faults = (Fault(number=106, where="[/a] scan[old].png", value="2"), Fault(number=101, where="masks[/a].png"))
    site = SiteData(name="[old] St A", slices=(), images_found=2, exclusions=faults)
    console = Console(width=200)
    report_sites(Hospitals(root=tmp_path, phantoms=False, sites={}, sources={site.name: site}), Screen(console))
    results = {"sites": {site.name: {"patients": {"test": 1}}}, "summary": {}}
    console.print(final_table(results))
    printed = capsys.readouterr().out
    assert all(f"  {fault}\n" in printed for fault in faults)
    assert "[[study.labels]]" in printed
    assert printed.count(site.name) == 2

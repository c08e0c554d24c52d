"""The main job as its user runs it: real processes, Flower's real engine, phantoms and real images."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from simulations.commit import commit
from simulations.phantoms import PhantomSite, write_phantoms

ROOT = Path(__file__).parents[1]
REAL = ROOT.parent / "shared" / "data" / "lgg-multisite"
RUN_SIM = [sys.executable, str(ROOT / "simulations" / "run_sim.py")]
ICMOE = [sys.executable, "-m", "icmoe"]
TINY = ["--backbone", "sam-vit-test", "--image-size", "64", "--rounds", "2", "--local-epochs", "1"]
METHODS = "router-aware,fedavg,fedprox,fedadam,personal,personalised,local,pooled"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A user's cache folder of its own, so that every feature is computed here."""
    return {**os.environ, "XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache")), "COLUMNS": "200"}


def run(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)


def models_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "models").glob("*.safetensors"))}


def scores_of(folder: Path) -> dict[str, object]:
    """Everything in the results that does not measure time."""
    results = json.loads((folder / "results.json").read_text())
    for key in ("seconds", "created"):
        del results[key]
    for by_seed in results["methods"].values():
        for record in by_seed.values():
            for row in record["rounds"]:
                del row["seconds"]
                for site in row["sites"].values():
                    del site["seconds"]
    return results


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("run") / "out"
    done = run([*RUN_SIM, *TINY, "--methods", METHODS, "--track", "tensorboard", "--out", str(out)], environment)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_tensorboards_events_hold_what_the_results_hold(rehearsed: tuple[Path, str]) -> None:
    out, _ = rehearsed
    results = json.loads((out / "results.json").read_text())
    rounds = results["methods"]["router-aware"]["1"]["rounds"]
    found = EventAccumulator(str(out / "tensorboard" / "router-aware-seed1")).Reload()
    steps = [(event.step, pytest.approx(event.value, rel=1e-6)) for event in found.Scalars("loss/all sites")]
    assert steps == [(row["round"], row["loss"]) for row in rounds]
    dice = [(event.step, pytest.approx(event.value, rel=1e-6)) for event in found.Scalars("val Dice/all sites")]
    assert dice == [(row["round"], row["val_dice"]) for row in rounds]
    for way in ("up", "down"):
        sizes = [event.value for event in found.Scalars(f"bytes/{way}")]
        assert sizes == pytest.approx([row[f"bytes_{way}"] for row in rounds], rel=1e-6)
    site, expert = next(iter(rounds[0]["sites"])), results["experts"][0]
    usage = [event.value for event in found.Scalars(f"usage/{site}/{expert}")]
    assert usage == pytest.approx([row["sites"][site]["usage"][0] for row in rounds], rel=1e-6)
    assert {path.name for path in (out / "tensorboard").iterdir()} == {
        f"{name}-seed1" for name in METHODS.split(",") if name != "personalised"
    }, "all but what has no rounds"


def test_what_standard_output_cannot_take_does_not_keep_a_rehearsal_from_ending_well(
    rehearsed: tuple[Path, str], environment: dict[str, str]
) -> None:
    out = rehearsed[0].parent / "für"
    out.symlink_to("out")
    words = [*RUN_SIM, *TINY, "--methods", METHODS, "--out", str(out), "--resume"]
    closed = run(["/bin/sh", "-c", 'exec "$@" >&-', "sh", *words, "--json"], environment)
    assert (closed.returncode, "Traceback" in closed.stderr) == (0, False), closed.stderr
    done = run(words, {**environment, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, r"f\xfcr/report.html" in done.stdout) == (0, True), done.stderr


def test_phantoms_are_called_phantoms_on_screen_and_in_every_output(rehearsed: tuple[Path, str]) -> None:
    out, screen = rehearsed
    assert "phantoms" in screen
    assert json.loads((out / "results.json").read_text())["phantoms"] is True
    assert "phantom" in (out / "report.html").read_text().lower()
    with safe_open(out / "models" / "router-aware-seed1.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["icmoe"])["phantoms"] is True


def test_results_hold_what_the_schema_promises(rehearsed: tuple[Path, str]) -> None:
    results = json.loads((rehearsed[0] / "results.json").read_text())
    assert results["schema_version"] == 1
    assert results["backbone"]["weights_digest_before"] == results["backbone"]["weights_digest_after"]
    assert results["configuration"]["study"]["rounds"] == 2
    for name in ("router-aware", "fedavg", "fedprox", "fedadam", "personal", "pooled"):
        record = results["methods"][name]["1"]
        assert [row["round"] for row in record["rounds"]] == [1, 2]
        assert 0.0 <= record["test"]["pooled"]["dice"] <= 1.0
        assert (rehearsed[0] / record["model"]).is_file()
        assert all(row["val_dice"] is not None for row in record["rounds"]), name
    assert set(results["methods"]["local"]["1"]["models"]) == set(results["sites"])
    models = {path.stem for path in (rehearsed[0] / "models").glob("*.safetensors")}
    assert {path.stem for path in (rehearsed[0] / "models").glob("*.md")} == models, "each model has its card"
    card = (rehearsed[0] / "models" / "local-Alder-seed1.md").read_text()
    assert "| Alder | 10 | 0." in card
    assert "Birch" not in card
    usage = results["methods"]["router-aware"]["1"]["rounds"][0]["sites"]["Alder"]["usage"]
    assert sum(usage) == pytest.approx(1.0)
    assert len(usage) == len(results["experts"]) == 6
    check = results["data_check"]
    assert set(check["summaries"]) == {"Alder", "Birch", "Cedar", "Dogwood"}  # the pooled reference is no hospital
    assert check["summaries"]["Alder"]["images"] == 20  # eighteen
    assert check["findings"] == check["declined"] == check["faults"] == []


def test_every_key_of_the_results_is_documented_and_the_commit_is_the_codes(rehearsed: tuple[Path, str]) -> None:
    results = json.loads((rehearsed[0] / "results.json").read_text())
    page = (ROOT / "simulations" / "README.md").read_text()
    assert [key for key in results if not re.search(rf"`{key}\b", page)] == ["schema_version"]  # in the heading
    assert results["commit"] == commit()


def test_the_matrix_of_models_and_sites_holds_the_scores_of_each(rehearsed: tuple[Path, str]) -> None:
    results = json.loads((rehearsed[0] / "results.json").read_text())
    rows = {(row["method"], row["site"]): row for row in results["cross_site"]}
    methods, names = results["methods"], list(results["sites"])
    for method in ("router-aware", "fedavg", "fedprox", "fedadam", "personal", "pooled"):
        sites = methods[method]["1"]["test"]["sites"]
        assert {name: score["mean"] for name, score in rows[method, None]["dice"].items()} == {n: sites[n]["dice"] for n in names}
    for method in ("local", "personal", "personalised"):
        own = methods[method]["1"]["own_test"]["sites"]
        for name in names:
            assert rows[method, name]["dice"][name] == {"mean": own[name]["dice"], "std": None}
            assert all(rows[method, name]["dice"][other]["mean"] is not None for other in names)
    assert len(rows) == len(results["cross_site"]) == 6 + 3 * len(names)


def test_federated_methods_send_updates_and_local_training_sends_nothing(rehearsed: tuple[Path, str]) -> None:
    methods = json.loads((rehearsed[0] / "results.json").read_text())["methods"]
    shared = methods["router-aware"]["1"]["rounds"][0]["sites"]["Alder"]["bytes_up"]
    personal = methods["personal"]["1"]["rounds"][0]["sites"]["Alder"]["bytes_up"]
    assert 0 < personal < shared  # adaptive experts and router stay at the site
    assert methods["local"]["1"]["rounds"][0]["bytes_up"] == methods["pooled"]["1"]["rounds"][0]["bytes_up"] == 0


def test_each_site_gets_a_model_of_its_own_that_is_compared_with_its_local_one(
    rehearsed: tuple[Path, str], environment: dict[str, str]
) -> None:
    out, screen = rehearsed
    results = json.loads((out / "results.json").read_text())
    record = results["methods"]["personalised"]["1"]
    assert set(record["chosen"]) == set(record["models"]) == set(results["sites"])
    assert record["own_test"] == record["test"]
    bars = {row["bar"]: row for row in results["comparisons"] if row["sentence"].startswith("personalised")}
    gains = [
        row["dice"] - results["methods"]["local"]["1"]["own_test"]["sites"][name]["dice"]
        for name, row in record["own_test"]["sites"].items()
        if row["dice"] is not None
    ]
    assert bars[-0.01]["value"] == pytest.approx(min(gains))
    assert bars[0.02]["value"] == pytest.approx(sum(gains) / len(gains))
    assert "(bar 0.02: " in screen
    command = [*ICMOE, "evaluate", "--model", str(out / record["models"]["Alder"]), "--data", str(out / "phantoms"), "--json"]
    done = run(command, environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["sites"]["Alder"]["dice"] == pytest.approx(record["test"]["sites"]["Alder"]["dice"], abs=1e-6)


def test_pooled_takes_as_many_steps_as_all_sites_together(rehearsed: tuple[Path, str]) -> None:
    methods = json.loads((rehearsed[0] / "results.json").read_text())["methods"]
    together = sum(row["steps"] for row in methods["local"]["1"]["rounds"][0]["sites"].values())
    assert methods["pooled"]["1"]["rounds"][0]["sites"]["(pooled)"]["steps"] == together


def test_same_seed_gives_the_same_bytes_and_resume_after_a_kill_too(
    rehearsed: tuple[Path, str], environment: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    command = [*RUN_SIM, *TINY, "--methods", "router-aware,personal,personalised,local", "--out", str(out)]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, env=environment, start_new_session=True, **silent)
    deadline = time.monotonic() + 300
    while not list((out / ".work").glob("router-aware-seed1.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=60)
    assert not (out / "results.json").exists()

    refused = run(command, environment)
    assert refused.returncode == 1
    assert "ICM502" in refused.stderr

    resumed = run([*command, "--resume"], environment)
    assert resumed.returncode == 0, resumed.stderr
    assert not list((out / ".work").glob("replies-*")), "what the killed run left"
    undisturbed, again = models_of(rehearsed[0]), models_of(out)
    assert again.keys() <= undisturbed.keys()
    assert all(undisturbed[name] == data for name, data in again.items())
    expected, found = scores_of(rehearsed[0]), scores_of(out)
    assert found["methods"]["router-aware"] == expected["methods"]["router-aware"]
    assert found["methods"]["personal"] == expected["methods"]["personal"]
    assert found["methods"]["personalised"] == expected["methods"]["personalised"]
    assert run([*command, "--resume"], environment).returncode == 0  # complete: nothing is trained again


def test_evaluate_gives_the_scores_of_the_rehearsal(rehearsed: tuple[Path, str], environment: dict[str, str]) -> None:
    out = rehearsed[0]
    model = out / "models" / "router-aware-seed1.safetensors"
    done = run([*ICMOE, "evaluate", "--model", str(model), "--data", str(out / "phantoms"), "--json"], environment)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    expected = json.loads((out / "results.json").read_text())["methods"]["router-aware"]["1"]["test"]
    for name, row in expected["sites"].items():
        assert record["sites"][name]["dice"] == pytest.approx(row["dice"], abs=1e-6)
    assert record["pooled"]["patients"] == 6
    assert record["model"]["phantoms"] is True
    assert record["model"]["test_only"] is True


def test_a_split_file_at_the_root_and_unseen_sites_are_scored(
    rehearsed: tuple[Path, str], environment: dict[str, str], tmp_path: Path
) -> None:
    source = rehearsed[0] / "phantoms"
    rows = [row for row in csv.DictReader((source / "splits" / "test.csv").open()) if row["site"] == "Alder"]
    for row in rows:
        for key in ("image", "mask"):
            row[key], old = row[key].replace("Alder", "Elsewhere"), row[key]
            (tmp_path / row[key]).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / old, tmp_path / row[key])
        row["site"] = "Elsewhere"
        row["split"] = "external"
    with (tmp_path / "external.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    model = rehearsed[0] / "models" / "pooled-seed1.safetensors"
    done = run([*ICMOE, "evaluate", "--model", str(model), "--data", str(tmp_path), "--split", "external", "--json"], environment)
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)["sites"]) == {"Elsewhere"}


def test_virtual_sites_are_repeated_and_dealt(environment: dict[str, str], tmp_path: Path) -> None:
    scenario = tmp_path / "dealt.toml"
    scenario.write_text('[simulation]\nsites = 6\nalpha = 0.5\nmethods = ["router-aware"]\n')
    done = run([*RUN_SIM, *TINY, "--scenario", str(scenario), "--out", str(tmp_path / "out"), "--json"], environment)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert len(results["sites"]) == 6
    assert results["methods"]["router-aware"]["1"]["test"]["pooled"]["patients"] == 6


def test_sites_are_repeated_and_one_with_other_data_is_named(environment: dict[str, str], tmp_path: Path) -> None:
    counts = {"train_patients": 11, "val_patients": 1, "test_patients": 1, "slices_per_patient": 1}
    usual = [PhantomSite(name=name, **counts) for name in ("Alder", "Birch", "Cedar")]
    write_phantoms(
        tmp_path / "data", seed=5, size_px=64, sites=[*usual, PhantomSite(name="Odd", field_of_view_mm=500.0, **counts)]
    )
    options = ["--data", str(tmp_path / "data"), "--sites", "5", "--methods", "router-aware", "--rounds", "1"]
    done = run([*RUN_SIM, *TINY[:4], "--local-epochs", "1", *options, "--out", str(tmp_path / "out")], environment)
    assert done.returncode == 0, done.stderr
    check = json.loads((tmp_path / "out" / "results.json").read_text())["data_check"]
    assert set(check["summaries"]) == {"Alder", "Alder-2", "Birch", "Cedar", "Odd"}
    assert check["summaries"]["Odd"]["patients"] == 20  # eleven, rounded up also in a rehearsal with exact sizes
    (sentence,) = [finding["sentence"] for finding in check["findings"]]
    assert sentence.startswith("Odd: pixel distance 7.8 mm")
    assert sentence in done.stdout
    assert sentence in (tmp_path / "out" / "report.html").read_text()


BAD_OPTIONS = {
    "an unknown method": (["--methods", "router-aware,fedsgd"], "ICM202"),
    "both seed options": (["--seed", "1", "--seeds", "3"], "ICM210"),
    "a folder that is not there": (["--data", "nowhere"], "ICM109"),
    "a device that is not there": (["--device", "cuda:7"], "ICM211"),
    "an image size off the grid": (["--image-size", "100"], "ICM202"),
    "no rounds": (["--rounds", "0"], "ICM202"),
    "a backbone without weights": (["--backbone", "sam-vit-b"], "ICM207"),
    "an unknown backbone": (["--backbone", "resnet"], "ICM202"),
    "a scenario that is not there": (["--scenario", "missing.toml"], "ICM205"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_bad_options_give_a_numbered_sentence_and_no_traceback(name: str, environment: dict[str, str], tmp_path: Path) -> None:
    options, number = BAD_OPTIONS[name]
    base = TINY if "--backbone" not in options else []
    done = run([*RUN_SIM, *base, *options, "--out", str(tmp_path / "out")], environment)
    assert done.returncode != 0
    assert number in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert not (tmp_path / "out" / "results.json").exists()


def test_a_wrong_setting_is_told_before_ray_and_flower_are_imported(environment: dict[str, str]) -> None:
    code = "import atexit, sys; atexit.register(lambda: print({'ray', 'flwr'} & set(sys.modules)))\n"
    code += "from simulations.run_sim import app; app(['--rounds', '0'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (1, "set()\n"), done.stderr


def test_a_scenario_with_an_unknown_key_names_the_nearest(environment: dict[str, str], tmp_path: Path) -> None:
    scenario = tmp_path / "wrong.toml"
    scenario.write_text('[study]\nruonds = 3\n[study.training]\nbatch_size = "four"\n')
    done = run([*RUN_SIM, "--scenario", str(scenario), "--out", str(tmp_path / "out")], environment)
    assert done.returncode == 1
    assert 'Did you mean "rounds"?' in done.stderr
    assert "ICM202" in done.stderr  # both faults at once


def test_a_changed_backbone_digest_is_refused(environment: dict[str, str], tmp_path: Path) -> None:
    scenario = tmp_path / "digest.toml"
    backbone = f'[study.backbone]\nname = "sam-vit-test"\nimage_size = 64\ndigest = "{"ab" * 32}"\n'
    scenario.write_text("[study]\ntest_only = true\n" + backbone)
    done = run([*RUN_SIM, "--scenario", str(scenario), "--out", str(tmp_path / "out")], environment)
    assert done.returncode == 1
    assert "ICM206" in done.stderr
    assert "ab" * 32 in done.stderr


@pytest.fixture(scope="module")
def real_subset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few real patients per hospital, for as long as the test runs."""
    if not REAL.is_dir():
        pytest.skip("the real hospital images are not at ../shared/data")
    root = tmp_path_factory.mktemp("real")
    (root / "splits").mkdir()
    for split, patients in (("train", 2), ("val", 1), ("test", 1)):
        chosen: dict[str, list[str]] = {}
        kept = []
        for row in csv.DictReader((REAL / "splits" / f"{split}.csv").open()):
            names = chosen.setdefault(row["site"], [])
            if row["patient"] not in names and len(names) < patients:
                names.append(row["patient"])
            if row["patient"] in names and int(row["slice"]) % 4 == 1:
                kept.append(row)
                for key in ("image", "mask"):
                    (root / row[key]).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(REAL / row[key], root / row[key])
        with (root / "splits" / f"{split}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, kept[0].keys())
            writer.writeheader()
            writer.writerows(kept)
    return root


@pytest.mark.real
def test_real_hospitals_train_together_and_the_tiny_one_harms_nobody(
    real_subset: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "real"
    options = ["--methods", "router-aware", "--rounds", "3", "--local-epochs", "3", "--out", str(out)]
    done = run([*RUN_SIM, "--data", str(real_subset), *options], environment)
    assert done.returncode == 0, done.stderr
    results = json.loads((out / "results.json").read_text())
    assert results["phantoms"] is False
    assert results["sites"]["EZ"]["images_used"] > 0
    assert set(results["methods"]["router-aware"]["1"]["rounds"][0]["sites"]) == {"CS", "DU", "EZ", "HT"}
    test = results["methods"]["router-aware"]["1"]["test"]
    assert test["sites"]["EZ"]["dice"] is None  # no test patient: no score, and no zero
    assert test["pooled"]["dice"] > 0.4  # nine passes over some ten slices per site find the tumour; chance is near 0.05
    assert test["sites"]["CS"]["hd95_mm"] is None  # the pixel size is not known

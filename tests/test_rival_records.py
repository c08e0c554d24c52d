"""Records of rivals, and results of IC-MoE, as they come from a disk: whole, or refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_rivals import backbone, bench, hospitals, study
from typer.testing import CliRunner

from icmoe.errors import IcmoeError
from simulations.evidence.rivals import table
from simulations.evidence.rivals.__main__ import app
from simulations.evidence.rivals.run import Bench, Job, run

__all__ = ["backbone", "bench", "hospitals", "study"]


@pytest.mark.parametrize("harm", ["", "[]", "{", "no score", "a score of text", "a score of NaN", "no rounds"])
def test_a_damaged_record_makes_no_table_and_is_not_taken_for_finished(harm: str, bench: Bench) -> None:
    job = Job(method="mask-head", regime="fedavg", seed=1)
    record, path = run(job, bench), bench.result_path(job)
    kept = {key: value for key, value in record.items() if key != harm.removeprefix("no ")}
    wrong = {"a score of text": "1", "a score of NaN": float("nan")}
    other = {name: {"test": {**record["test"], "mean": {"dice": dice}}} for name, dice in wrong.items()}
    other["no score"] = {"test": None, "own_test": None}
    path.write_text(json.dumps({**kept, **other.get(harm, {})}) if " " in harm else harm)
    with pytest.raises(IcmoeError, match=f"ICM525 {path.name}: it is damaged"):
        table.read_rows(bench.folder, None)
    with pytest.raises(IcmoeError, match=f"ICM525 {path.name}: it is damaged"):
        run(job, bench)


def test_more_rounds_than_the_studys_are_no_short_run(bench: Bench) -> None:
    with pytest.raises(IcmoeError, match="ICM202 --rounds"):
        run(Job(method="mask-head", regime="fedavg", seed=1, rounds=bench.study.rounds + 1), bench)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"configuration": {"study": {}}, "methods": {"fedavg": {"1": {"rounds": []}}}}']
)
def test_damaged_results_of_ours_are_one_numbered_line(text: str, tmp_path: Path) -> None:
    ours = tmp_path / "results.json"
    ours.write_text(text)
    words = ["--data", str(tmp_path), "--out", str(tmp_path / "out"), "--hours", "0", "--ours", str(ours)]
    done = CliRunner().invoke(app, words)
    assert (done.exit_code, done.stderr.startswith(f"ICM217 {ours}: ")) == (1, True), done.output

"""Records of rivals, and results of IC-MoE, as they come from a disk: whole, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_rivals import backbone, bench, hospitals, study
from typer.testing import CliRunner

from icmoe.errors import IcmoeError
from icmoe.profiles import merged
from simulations.evidence.rivals import table
from simulations.evidence.rivals.__main__ import app
from simulations.evidence.rivals.origin import require_one_origin
from simulations.evidence.rivals.run import Bench, Job, run, study_of

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


def records_of(make_study, **changes: dict[str, Any]) -> list[dict[str, Any]]:
    """A record of a method with a rate of its own, another with a regime's seed and fewer rounds; `changes` to the second."""
    base = make_study(name="ours", rounds=3)
    found = []
    for job in (Job(method="full", regime="fedavg", seed=1), Job(method="mask-head", regime="fedprox", seed=2, rounds=1)):
        study = study_of(job, base).model_dump(mode="json")
        digests = {"data_digest": "d", "masks_digest": "m", "backbone_digest": "b"}
        found.append(
            {"method": job.method, "rounds": study["rounds"], "short": job.rounds is not None, "study": study, **digests}
        )
    found[1] = merged(found[1], changes)
    return found


OTHER = (
    ({"data_digest": "e"}, "pictures"),
    ({"masks_digest": "e"}, "masks"),
    ({"backbone_digest": "e"}, "backbone"),
    ({"study": {"training": {"learning_rate": 0.05}}}, "training"),
    ({"study": {"training": {"local_epochs": 7}}}, "training"),
    ({"study": {"training": {"views": ["identity"]}}}, "training"),
    ({"study": {"backbone": {"image_size": 96}}}, "study"),
    ({"study": {"loss": {"contrast": 0.7}}}, "study"),
    ({"rounds": 9, "short": False}, "rounds"),
)


def test_records_of_one_study_belong_together_whatever_seed_rounds_and_rate_a_job_has(make_study) -> None:
    require_one_origin(records_of(make_study), None)
    former = records_of(make_study, study={"training": {"proximal_mu": 0.01}, "name": "other"})
    del former[1]["masks_digest"], former[1]["study"]["training"]["views"]
    former[0]["study"]["training"].pop("views")
    require_one_origin(former, None)


@pytest.mark.parametrize(("changes", "told"), OTHER)
def test_records_of_another_study_or_other_data_are_refused_by_what_differs(
    changes: dict[str, Any], told: str, make_study
) -> None:
    with pytest.raises(IcmoeError, match=f"ICM526.*they differ in {told} "):
        require_one_origin(records_of(make_study, **changes), None)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"data_digest": "e"}, "pictures"),
        ({"masks_digest": "e"}, "masks"),
        ({"backbone": {"digest": "e"}}, "backbone"),
        ({"configuration": {"study": {"training": {"local_epochs": 7}}}}, "training"),
        ({"configuration": {"study": {"loss": {"contrast": 0.7}, "training": {"proximal_mu": 0.01}}}}, ""),
    ],
)
def test_ours_is_held_to_data_backbone_and_training(changes: dict[str, Any], told: str, make_study) -> None:
    study = make_study(name="ours", rounds=3).model_dump(mode="json")
    ours = {"data_digest": "d", "masks_digest": "m", "backbone": {"digest": "b"}, "configuration": {"study": study}}
    ours = merged(ours, changes)
    require_one_origin([], ours)
    if not told:
        require_one_origin(records_of(make_study), ours)
        return
    with pytest.raises(IcmoeError, match=f"ICM526.*they differ in {told} "):
        require_one_origin(records_of(make_study), ours)

"""MLflow's runs read back; what cannot be done ends with a sentence. `tests/test_run_sim.py` reads TensorBoard's events."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from test_run_sim import RUN_SIM

from icmoe.errors import IcmoeError
from simulations.federation import Job
from simulations.tracking import scalars_of, tracking


@pytest.mark.parametrize(("tracker", "package"), [("tensorboard", "torch.utils.tensorboard"), ("mlflow", "mlflow")])
def test_without_the_package_a_sentence(tracker: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"simulations.to_{tracker}", raising=False)
    with pytest.raises(IcmoeError) as caught, tracking(tracker, tmp_path):
        pass
    assert f"ICM213 --track {tracker}" in str(caught.value)
    assert "icmoe-federated[track]" in str(caught.value)


def record(number: int) -> dict[str, Any]:
    row = {"loss": 0.5 / number, "val_dice": None, "usage": [0.5, 0.25, 0.25]}
    told = {"loss": 0.5 / number, "val_dice": 0.1 * number, "usage_spread": None, "bytes_up": 7, "bytes_down": 9}
    return {"round": number, "sites": {"Alder": row}, "privacy": {"epsilon": 0.25 * number}, **told}


def pair(number: int, val_dice: float | None) -> dict[str, Any]:
    """A round of local and pooled models side by side."""
    row = {"usage": [0.5, 0.25, 0.25], "seconds": 1.0, "bytes_up": 7, "bytes_down": 9}
    sites = {"(pooled)": row | {"loss": 0.25, "val_dice": val_dice}, "Alder": row | {"loss": 0.75, "val_dice": None}}
    told = {"loss": 0.5, "val_dice": val_dice, "usage_spread": 0.5, "bytes_up": 14, "bytes_down": 18}
    return {"round": number, "sites": sites, "privacy": None, **told}


def tracked(job: Job, folder: Path, *records: dict[str, Any] | None) -> None:
    with tracking("mlflow", folder) as (listen, _):
        for one in records:
            listen(job, one, "")


def test_mlflows_runs_hold_each_round_and_a_resumed_rehearsal_adds_to_them(make_study, tmp_path: Path) -> None:
    job = Job(method="router-aware", study=make_study(), names=("Alder",), state_path=tmp_path / "s")
    with pytest.raises(KeyError, match="loss"):
        tracked(job, tmp_path, None, record(1), {})  # the last one breaks off the rehearsal
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("rehearsal").experiment_id
    (run,) = client.search_runs([experiment])
    assert (run.info.run_name, run.info.status) == ("router-aware-seed3", "FAILED")
    assert run.data.tags["study digest"] == job.study.digest
    assert run.data.params["method"] == "router-aware"
    tracked(job, tmp_path, record(2))
    (run,) = client.search_runs([experiment])
    assert run.info.status == "FINISHED"
    assert run.data.metrics == pytest.approx(scalars_of(job, record(2)))
    for name, value in scalars_of(job, record(1)).items():
        assert next((one.step, one.value) for one in client.get_metric_history(run.info.run_id, name)) == (1, value)
    assert "usage/Alder/basic-1" in run.data.metrics
    assert (run.data.metrics["bytes/up"], run.data.metrics["bytes/down"]) == (7, 9)
    assert "val Dice/Alder" not in run.data.metrics  # withheld


def test_local_and_pooled_are_a_run_each_and_scores_that_come_later_are_told(make_study, tmp_path: Path) -> None:
    job = Job(method="alone", study=make_study(), names=("Alder", "(pooled)"), state_path=tmp_path / "s")
    with tracking("mlflow", tmp_path) as (listen, scored):
        listen(job, pair(1, None), "")
        listen(job, pair(2, None), "")
        scored(job, pair(1, 0.5))
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    found = {run.info.run_name: run for run in client.search_runs([client.get_experiment_by_name("rehearsal").experiment_id])}
    assert set(found) == {"local-seed3", "pooled-seed3"}
    local, pooled = (found[f"{name}-seed3"].data.metrics for name in ("local", "pooled"))
    assert (local["loss/all sites"], local["loss/Alder"], pooled["loss/all sites"], pooled["loss/pooled"]) == (
        0.75,
        0.75,
        0.25,
        0.25,
    )
    assert local["bytes/up"] == pooled["bytes/down"] == 0, "nothing travels"
    assert not {name for name in local if name.startswith(("val Dice", "usage/spread"))}
    history = client.get_metric_history(found["pooled-seed3"].info.run_id, "val Dice/all sites")
    assert [(one.step, one.value) for one in history] == [(1, 0.5)]
    assert len(client.get_metric_history(found["pooled-seed3"].info.run_id, "loss/all sites")) == 2


@pytest.mark.parametrize(
    ("site", "told"),
    [("St. Mary's", "St. Mary_27_s"), ("K\u00f6ln (Nord)", "K\u00f6ln _28_Nord_29_"), ("a,b", "a_2c_b"), ("a;b", "a_3b_b")],
)
def test_a_sites_name_that_mlflow_refuses_is_written_down(site: str, told: str, make_study, tmp_path: Path) -> None:
    job = Job(method="router-aware", study=make_study(), names=(site,), state_path=tmp_path / "s")
    told_by_site = record(1)
    told_by_site["sites"] = {site: told_by_site["sites"]["Alder"]}
    tracked(job, tmp_path, told_by_site)
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("rehearsal").experiment_id])
    assert run.data.metrics[f"loss/{told}"] == 0.5


def test_a_start_that_is_refused_leaves_nothing_of_mlflow(tmp_path: Path) -> None:
    with tracking("mlflow", tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_an_unknown_tracker_is_refused() -> None:
    done = subprocess.run([*RUN_SIM, "--track", "wandb"], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1
    assert "ICM210 --track" in done.stderr

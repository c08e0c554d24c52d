"""MLflow's runs of a rehearsal, in an SQLite file beside its results: no server, nothing leaves the machine."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from time import time_ns

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # read when the package is imported

from mlflow import MlflowClient
from mlflow.entities import Metric

from simulations.federation import Job
from simulations.tracking import run_name

FILE = "mlflow.db"
EXPERIMENT = "rehearsal"


def accepted(name: str) -> str:
    """Return a figure's name with each character that MLflow refuses as its code, so that two sites' names stay two."""
    return re.sub(r"[^/\w.\- ]", lambda found: f"_{ord(found[0]):x}_", name)


class MLflow:
    """One run per method and seed in `mlflow.db` in the rehearsal's folder: `mlflow ui --backend-store-uri sqlite:///FILE`."""

    def __init__(self, folder: Path) -> None:
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)  # they tell of every table that they make
        self._folder, self._runs = folder, dict[str, str]()
        self._open: MlflowClient | None = None

    @property
    def _client(self) -> MlflowClient:
        if self._open is None:  # not before there is something to write: a start that is refused leaves nothing
            self._open = MlflowClient(tracking_uri=f"sqlite:///{(self._folder / FILE).resolve()}")
        return self._open

    def write(self, job: Job, scalars: Mapping[str, float], number: int) -> None:
        """Write the figures of a round."""
        now_ms = time_ns() // 1_000_000
        metrics = [Metric(accepted(name), float(value), now_ms, number) for name, value in scalars.items()]
        self._client.log_batch(self._run(job), metrics=metrics)

    def close(self, *, finished: bool) -> None:
        """End all runs as finished, or as failed where the rehearsal did not come to its end."""
        for run_id in self._runs.values():
            self._client.set_terminated(run_id, "FINISHED" if finished else "FAILED")

    def _run(self, job: Job) -> str:
        """Return the identifier of the run of a method and seed; a resumed rehearsal goes on with the run that is there."""
        name = run_name(job)
        if name not in self._runs:
            found = self._client.search_runs([self._experiment()], f"attributes.run_name = '{name}'", max_results=1)
            self._runs[name] = found[0].info.run_id if found else self._begun(job, name)
            self._client.update_run(self._runs[name], status="RUNNING")
        return self._runs[name]

    def _begun(self, job: Job, name: str) -> str:
        study = job.study
        run_id = str(self._client.create_run(self._experiment(), run_name=name, tags={"study digest": study.digest}).info.run_id)
        told = {"method": job.method, "seed": study.seed, "study": study.name, "rounds": study.rounds}
        for key, value in {**told, "backbone": study.backbone.name, "epochs": study.training.local_epochs}.items():
            self._client.log_param(run_id, key, value)
        return run_id

    def _experiment(self) -> str:
        known = self._client.get_experiment_by_name(EXPERIMENT)
        if known is not None:
            return str(known.experiment_id)
        artifacts = (self._folder / "mlflow").resolve().as_uri()
        return str(self._client.create_experiment(EXPERIMENT, artifact_location=artifacts))

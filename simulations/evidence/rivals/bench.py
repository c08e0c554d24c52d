"""Jobs in processes of their own, one after the other, so that each one's peak memory is its own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch
from flwr.supercore.task_identity import TaskIdentity

from fl_client.watchdog import end_with_parent
from icmoe.backbone import chosen_backbone, weights_path
from icmoe.cache_entries import default_cache_folder
from icmoe.errors import Fault, IcmoeError
from icmoe.features import FeatureCache
from simulations.commit import commit
from simulations.evidence.rivals.regimes import CPU
from simulations.evidence.rivals.run import Bench, Job, run
from simulations.hospitals import find_hospitals
from simulations.interruption import exit_on_interruption
from simulations.scenario import read_scenario


def open_bench(data: Path, out: Path, scenario: Path | None) -> Bench:
    """Return what all jobs share.

    Raises
    ------
    IcmoeError
        202 where the backbone is not lite-medsam as a whole, whose parts the rivals train; otherwise as a rehearsal.
    """
    study, simulation = read_scenario(scenario, {}, {"data": str(data)})
    chosen = study.backbone
    if chosen.name != "lite-medsam":
        raise IcmoeError(Fault(number=202, where="backbone.name", value=chosen.name, limit="lite-medsam"))
    if chosen.cut != "end":
        raise IcmoeError(Fault(number=202, where="backbone.cut", value=chosen.cut, limit="end"))
    return Bench(
        study=study,
        hospitals=find_hospitals(simulation, study, out / "phantoms"),
        backbone=chosen_backbone(chosen, checkpoint=None, device=CPU),
        weights=torch.load(weights_path(chosen.name, None), map_location="cpu", weights_only=True),
        cache=FeatureCache.of(default_cache_folder(), study),
        folder=out,
        tell=lambda line: print(line, flush=True),
        commit=commit(),
    )


def run_all(jobs: Sequence[Job], data: Path, out: Path, scenario: Path | None, end: float) -> None:
    """Run the jobs in order until `end`, on the clock of `time.monotonic`.

    Raises
    ------
    IcmoeError
        503 where a process was killed; otherwise as `run`.
    """
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(1, mp_context=context, initializer=_begin, initargs=(os.getpid(),), max_tasks_per_child=1)
    # Told inside of the pool, which would wait for the job's end, hours away.
    with pool as one_by_one, exit_on_interruption("Start again to go on."):
        for job in jobs:
            try:
                complete = one_by_one.submit(_run_one, job, data, out, scenario, end).result()
            except BrokenProcessPool:
                did, todo = "Finished rounds are kept.", "Look for memory, then start again to go on."
                raise IcmoeError(Fault(number=503, where=job.name, what="its process was killed", did=did, todo=todo)) from None
            if not complete:
                print(f"{job.name} is not finished: the time is over. Start again to go on.", flush=True)
                return


def _begin(parent: int) -> None:
    """Let a job's process leave an interruption to its parent, with which it ends, and make messages as Flower's processes do."""
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1  # its server optimisers take replies alone
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent(parent)


def _run_one(job: Job, data: Path, out: Path, scenario: Path | None, end: float) -> bool:
    torch.set_num_threads(1)
    return run(job, open_bench(data, out, scenario), until=lambda: time.monotonic() > end) is not None

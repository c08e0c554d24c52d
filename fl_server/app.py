"""The coordinator's Flower ServerApp: a study's rounds from its seeded start to its final model file."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fl_server import audit
from fl_server.aggregate import IDENTITY
from fl_server.arriving import one_by_one
from fl_server.beside import audit_path, lock_path, read_lifted, waiting_path
from fl_server.data_check import check_data
from fl_server.guard import Guard, Note
from fl_server.private import Private
from fl_server.receipts import Receipted
from fl_server.robust import Robust
from fl_server.roster import Roster, meet, welcome
from fl_server.round_strategy import RoundStrategy, unheard
from fl_server.rounds import clock, run_rounds
from fl_server.router_aware import RouterAware
from fl_server.run_state import KEPT, RunState, latest_state
from fl_server.study_card import write_study_card
from fl_server.sums import FromSums
from fl_server.waiting import begun, write_wait
from icmoe.atomic import regular, write_atomically
from icmoe.errors import Fault, IcmoeError, faults_of, print_faults
from icmoe.exchange import global_state
from icmoe.locks import claim
from icmoe.model import build_model
from icmoe.modelfile import ModelHeader, write_model
from icmoe.processes import sweep_often
from icmoe.strategies import SERVER_OPTIMIZERS
from icmoe.study import Study, derived_seed, read_study

log = logging.getLogger("fl_server")

HANDOVER_S = 60.0  # a stopped run asks its SuperLink every few seconds, but not while it aggregates


def make_strategy(
    study: Study,
    roster: Roster,
    *,
    note: Note = unheard,
    lifted: Callable[[], Mapping[str, int]] = dict,
) -> Guard:
    """Return the study's strategy: router-aware FedAvg, optimised, private or robust as the study says, and guarded.

    Parameters
    ----------
    study
        What it says of aggregation, privacy and bounds decides.
    roster
        Who takes part.
    note, lifted
        As for `Guard`.
    """
    private, robust = study.privacy.server is not None, study.aggregation.robust != "none"
    form = FromSums if study.aggregation.form == "sums" and not private else RouterAware
    mean = form(study, roster.sites, roster.sizes, IDENTITY if private or robust else None)
    stepped = SERVER_OPTIMIZERS[study.aggregation.optimizer]
    strategy: RoundStrategy = resolve_name(stepped)(mean) if stepped else mean
    if private:
        strategy = Private(strategy, study, roster.sites)
    elif robust:
        strategy = Robust(strategy, study, roster.sites)
    return Guard(strategy, study, roster.sites, roster.sizes, note=note, lifted=lifted)


def compare_sites(grid: Grid, roster: Roster, study: Study, path: Path) -> None:
    """Check the sites' data before the first round: log what was found and keep it at `path`."""
    check = check_data(grid, roster.sites, study)
    write_atomically(path, check.data())
    for line in check.lines():
        log.warning("%s", line)
    log.info("data check: %d of %d sites shared a summary, kept in %s", len(check.summaries), len(roster.sites), path.name)


def start_state(study: Study) -> RunState:
    """Return round 0: the seeded initial tensors, equal for every method with the study's seed."""
    model = build_model(study, seed=derived_seed(study, "model"))
    return RunState(study.digest, {name: tensor.numpy() for name, tensor in global_state(model).items()})


app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the study that the run configuration names; state, faults and model are written beside it.

    The path is one of the coordinator's own file system. A site never reads it: it takes every setting from its copy.
    """
    path = Path(str(context.run_config["study"]))
    faults = path.with_suffix(".faults.json")
    faults.unlink(missing_ok=True)
    try:
        with only_run_of(path):
            sweep_often()
            run_study(one_by_one(grid), path, run=str(context.run_id))
    except (IcmoeError, OSError) as error:
        found = faults_of(error)
        with suppress(OSError):  # the disk may be full
            write_atomically(faults, json.dumps([fault.record() for fault in found]).encode())
        print_faults(found)
        raise  # Flower reports an exception at once; after an exit it would wait a minute and lose the lines above


def run_study(grid: Grid, path: Path, *, run: str) -> None:
    """Run what is left of a study, from its committed state where there is one, and write its model.

    `run` is Flower's number of the run, which stands in the audit logs of coordinator and sites alike.

    Raises
    ------
    IcmoeError
        As `read_study`, `meet`, `RunState.load` and `run_rounds`.
    """
    study = read_study(path)
    committed = path.with_suffix(".state.safetensors")
    found = latest_state(committed, study)
    state = start_state(study) if found is None else found
    if not state.closed:
        tell, watch = partial(say, path), partial(write_wait, path)
        watch(begun("connection", "introductions", state.round, study.deadline_s, ()))
        tell(f"{study.name}: waiting for {study.quorum} sites until {clock(study.deadline_s)}")
        roster = meet(grid, study.quorum, study)
        if found is None:
            names = sorted(roster.sizes)
            watch(begun("answers", "data check", state.round, study.deadline_s, names, asked=names))
            tell(f"data check: waiting for {', '.join(names)} until {clock(study.deadline_s)}")
            compare_sites(grid, roster, study, path.with_suffix(".data_check.json"))

        def note(event: str, values: Mapping[str, Any]) -> None:
            audit.note(audit_path(path), event, {**values, "run": run})

        strategy = make_strategy(study, roster, note=note, lifted=partial(read_lifted, path))
        commit = partial(RunState.commit, path=committed, keep=KEPT)
        receipted = Receipted(grid, roster.sites, path.parent.parent / "receipts")
        joining, sites = partial(welcome, grid, roster, study), roster.sites
        run_rounds(receipted, strategy, study, state, sites=sites, commit=commit, tell=tell, watch=watch, welcome=joining)
    header = ModelHeader(study=study, method="router-aware", round=state.round, phantoms=False)
    tensors = {name: torch.from_numpy(tensor) for name, tensor in state.arrays.items()}
    write_model(path.with_suffix(".model.safetensors"), tensors, header)
    write_study_card(path.with_suffix(".model.safetensors"), header, state.history, path.with_suffix(".data_check.json"))


def say(path: Path, line: str) -> None:
    """Print a line to the run's log, which flwr log shows, and leave it beside the study for fl_server run."""
    print(line, file=sys.stderr, flush=True)
    with suppress(OSError):  # a full disk is found by what must be written
        write_atomically(waiting_path(path), line.encode(), durable=False)


@contextmanager
def only_run_of(path: Path) -> Iterator[None]:
    """Hold the study while it runs, so that two runs never write one state.

    A run that was stopped goes on until its next call to the SuperLink is refused; it is waited for.

    Yields
    ------
    None

    Raises
    ------
    IcmoeError
        506 where another run holds it for `HANDOVER_S`.
    """
    with open(lock_path(path), "a", opener=regular) as lock:
        busy = Fault(number=506, where=path.parent.name, did="This run ends; the other goes on.")
        claim(lock, busy, deadline_s=HANDOVER_S)
        yield

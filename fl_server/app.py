"""The coordinator's Flower ServerApp: a study's rounds from its seeded start to its final model file."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from flwr.app import ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp

from fl_server.data_check import check_data
from fl_server.rounds import RoundStrategy, RunState, introduce, run_rounds
from fl_server.router_aware import RouterAware
from fl_server.server_optimizer import ServerOptimized
from icmoe.atomic import write_atomically
from icmoe.errors import Fault, IcmoeError, print_faults
from icmoe.exchange import CONFIG, SITE_KEY, SLICES_KEY, global_state
from icmoe.model import build_model
from icmoe.modelfile import ModelHeader, write_model
from icmoe.study import Study, derived_seed, read_study

log = logging.getLogger("fl_server")


@dataclass(frozen=True, slots=True)
class Roster:
    """Who takes part.

    Parameters
    ----------
    sites
        Name by node.
    sizes
        Announced n_k by name.
    """

    sites: dict[int, str]
    sizes: dict[str, int]


def make_strategy(study: Study, roster: Roster) -> RoundStrategy:
    """Return the study's strategy: router-aware FedAvg, wrapped by a server optimiser where the study names one."""
    strategy = RouterAware(study, roster.sites, roster.sizes)
    return strategy if study.aggregation.optimizer == "none" else ServerOptimized(strategy)


def meet(grid: Grid, nodes: int, study: Study, *, poll_s: float = 1.0) -> Roster:
    """Return the sites behind the connected nodes.

    Raises
    ------
    IcmoeError
        501 where too few answer, 301 where an answer is not a name and a size, or a name comes twice.
    """
    sites: dict[int, str] = {}
    sizes: dict[str, int] = {}
    for node, answer in introduce(grid, nodes, study, deadline_s=study.deadline_s, poll_s=poll_s).items():
        about = answer.config_records.get(CONFIG, ConfigRecord())
        name, size = about.get(SITE_KEY), about.get(SLICES_KEY)
        if not isinstance(name, str) or not isinstance(size, int) or name in sizes:
            what = "a site introduced itself badly, or by the name of another"
            raise IcmoeError(Fault(number=301, what=what, value=repr(name)[:40], did="Nothing was started."))
        sites[node], sizes[name] = name, size
    return Roster(sites, sizes)


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
    """Run the study that the run configuration names and write its model beside it."""
    try:
        path = Path(str(context.run_config["study"]))
        study = read_study(path)
        roster = meet(grid, study.quorum, study)
        committed = path.with_suffix(".state.safetensors")
        if not committed.exists():
            compare_sites(grid, roster, study, path.with_suffix(".data_check.json"))
        state = RunState.load(committed, study) if committed.exists() else start_state(study)
        strategy = make_strategy(study, roster)
        run_rounds(grid, strategy, study, state, sites=roster.sites, commit=lambda now: now.commit(committed))
        header = ModelHeader(study=study, method="router-aware", round=state.round, phantoms=False)
        tensors = {name: torch.from_numpy(tensor) for name, tensor in state.arrays.items()}
        write_model(path.with_suffix(".model.safetensors"), tensors, header)
    except IcmoeError as error:
        print_faults(error.faults)
        raise  # Flower reports an exception at once; after an exit it would wait a minute and lose the lines above

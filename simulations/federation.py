"""Many virtual hospitals on Flower's simulation engine with Ray: one engine start for all methods and seeds."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event

# Both must be set before the libraries are imported: a hospital's network carries no telemetry.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation
from pydantic import TypeAdapter

from fl_client.app import Handler
from fl_client.participant import Participant
from fl_server.app import make_strategy, start_state
from fl_server.data_check import DataCheck, check_data
from fl_server.grid import InFront
from fl_server.roster import Roster, await_online, meet
from fl_server.round_log import RoundRecord
from fl_server.round_strategy import unheard
from fl_server.rounds import run_rounds
from fl_server.run_state import RunState
from icmoe.atomic import write_atomically
from icmoe.errors import NOT_STARTED, Fault, IcmoeError
from icmoe.study import Study
from simulations.alone import POOLED, Alone, spread_out
from simulations.lanes import LANES, PARTITION, AnySite, Lanes

CLUSTER_TIMEOUT_S = 10.0
"""For a connection to a Ray cluster that is named; Ray itself retries for minutes."""
END_S = 5.0
"""How long an interrupted rehearsal waits for the thread of its ServerApp."""
POLL_S = 0.05
SILENT = logging.CRITICAL + 1
"""Above every level of a log."""
# Flower's engine runs at most this many clients at once, and no more than cores of the driver's machine plus four.
MOST_ACTORS = 32

_SITES = TypeAdapter(tuple[Participant, ...])


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One study to run: a method with a seed.

    Parameters
    ----------
    method
        Name of `simulations.methods.FEDERATED`, or "alone" for local and pooled side by side.
    study
        The study as that method wants it.
    names
        Sites that take part.
    state_path
        Where its state is committed.
    """

    method: str
    study: Study
    names: tuple[str, ...]
    state_path: Path


@dataclass(frozen=True, slots=True)
class SitesOnDisk:
    """Finds a virtual node's site by its partition; only the path travels to the actors.

    Parameters
    ----------
    path
        JSON written by `write_sites`.
    """

    path: Path

    def __call__(self, context: Context, digest: str) -> Participant:
        """Return the site of the node's partition; it takes part in every study of the rehearsal."""
        del digest
        return _read_sites(self.path)[int(context.node_config[PARTITION])]


def write_sites(path: Path, sites: Sequence[Participant]) -> None:
    """Write the sites for the actors."""
    write_atomically(path, _SITES.dump_json(tuple(sites)))


@lru_cache(maxsize=2)
def _read_sites(path: Path) -> tuple[Participant, ...]:
    return _SITES.validate_json(path.read_bytes())


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """Where the virtual sites run.

    Parameters
    ----------
    address
        "local" starts a cluster on this machine; "auto" or HOST:PORT joins an existing one.
    cpus
        Processors to use of this machine.
    gpus_per_site
        Share of a GPU that one training site takes; 0 without a GPU.
    """

    address: str = "local"
    cpus: int = 1
    gpus_per_site: float = 0.0

    def backend_config(self) -> dict[str, dict[str, object]]:
        """Return Flower's configuration of its Ray backend."""
        init: dict[str, object] = {"address": self.address, "log_to_driver": False, "logging_level": logging.ERROR}
        if self.address == "local":
            init |= {"num_cpus": min(self.cpus, MOST_ACTORS), "include_dashboard": False}
        return {"client_resources": {"num_cpus": 1, "num_gpus": self.gpus_per_site}, "init_args": init}


class Stoppable(InFront):
    """A Grid that ends the thread that asks it, once the rehearsal was interrupted.

    Parameters
    ----------
    grid
        The Grid that sends and receives.
    stopped
        Set by the interruption.
    """

    def __init__(self, grid: Grid, stopped: Event) -> None:
        super().__init__(grid)
        self._stopped = stopped

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the answers that are there."""
        self._end_if_stopped()
        return super().pull_messages(message_ids)

    def get_node_ids(self) -> Iterable[int]:
        """Return the Grid's nodes."""
        self._end_if_stopped()
        return super().get_node_ids()

    def _end_if_stopped(self) -> None:
        if self._stopped.is_set():
            raise SystemExit  # ends this thread without a word


Listener = Callable[[Job, RoundRecord | None, str], None]
Scored = Callable[[Job, RoundRecord], None]


def run_jobs(
    jobs: Sequence[Job],
    sites_path: Path,
    engine: Engine,
    on_event: Listener,
    *,
    on_scored: Scored = unheard,
    on_check: Callable[[DataCheck], None] | None = None,
    handlers: Mapping[str, Handler] | None = None,
) -> dict[tuple[str, int], RunState]:
    """Run the jobs one after the other on one engine and return their final states by (method, seed).

    A job continues from its committed state where there is one.

    Parameters
    ----------
    jobs
        What to run.
    sites_path
        From `write_sites`.
    engine
        Where to run it.
    on_event
        Called with (job, None, site) as replies arrive and with (job, record, "") after each round.
    on_scored
        Called with (job, record) once a round's validation scores are in: with the next round, or at the job's end.
    on_check
        Where given, the sites' data are checked before the first job, and it is called with the outcome.
    handlers
        As for `make_client_app`.

    Raises
    ------
    IcmoeError
        503 where the engine stops, 505 where the cluster cannot be reached, and whatever stops a study.
    """
    quiet_libraries(SILENT)  # an engine that breaks down before any site has answered is told of in one line
    sites = _read_sites(sites_path)
    lanes = min(len(sites), LANES)
    for left in sites_path.parent.glob("replies-*"):  # by a run that was killed
        shutil.rmtree(left, ignore_errors=True)
    replies = TemporaryDirectory(dir=sites_path.parent, prefix="replies-", ignore_cleanup_errors=True)
    finished: dict[tuple[str, int], RunState] = {}
    server_app, stopped, ended = ServerApp(), Event(), Event()

    def rehearse(grid: Grid, context: Context) -> None:
        del context
        grid = Stoppable(grid, stopped)
        with ExitStack() as end:
            end.callback(ended.set)
            nodes = await_online(grid, lanes, deadline_s=jobs[0].study.deadline_s, poll_s=POLL_S)
            everybody = Lanes(grid, nodes, len(sites), Path(replies.name))
            roster = meet(everybody, len(sites), jobs[0].study, trust_answers=True, poll_s=POLL_S)
            quiet_libraries()  # sites have answered
            if on_check is not None:
                hospitals = {node: name for node, name in roster.sites.items() if name != POOLED}
                on_check(check_data(everybody, hospitals, jobs[0].study, poll_s=POLL_S))
            for job in jobs:
                finished[job.method, job.study.seed] = run_job(everybody, job, roster, on_event, on_scored)

    server_app.main()(rehearse)
    with replies:
        client_app = AnySite(SitesOnDisk(sites_path), handlers, Path(replies.name))
        _simulate(server_app, client_app, lanes, engine, stopped, ended)
    if len(finished) < len(jobs):
        raise IcmoeError(Fault(number=503, value=f"{len(finished)} of {len(jobs)} studies finished"))
    return finished


def _simulate(server_app: ServerApp, client_app: AnySite, lanes: int, engine: Engine, stopped: Event, ended: Event) -> None:
    """Run both apps to their end, or end them; `ended` is set once that of the server has."""
    start_ray(engine)
    try:
        run_simulation(
            server_app=server_app,
            client_app=client_app,
            num_supernodes=lanes,
            backend_config=engine.backend_config(),  # type: ignore[arg-type]
        )
    except (KeyboardInterrupt, SystemExit):
        _leave(stopped, ended)
        raise KeyboardInterrupt from None
    except RuntimeError as error:
        if ended.is_set():
            raise  # of a study, not of the engine
        _leave(stopped, ended)
        raise IcmoeError(engine_fault(error, engine)) from error


def start_ray(engine: Engine) -> None:
    """Start or join Ray, which Flower would do otherwise, after the thread of the ServerApp has begun to wait for it.

    Raises
    ------
    IcmoeError
        503 or 505 with what Ray says.
    """
    if ray.is_initialized():
        return
    before = signal.getsignal(signal.SIGTERM)
    path = os.pathsep.join(sys.path)  # as Flower does: its processes know this one's environment alone
    try:
        ray.init(runtime_env={"env_vars": {"PYTHONPATH": path}}, **engine.backend_config()["init_args"])
    except Exception as error:  # Ray has none of its own for this
        ray.shutdown()
        raise IcmoeError(engine_fault(error, engine)) from error
    # Ray's own answer to SIGTERM aborts the process three seconds later, whatever it is about.
    signal.signal(signal.SIGTERM, before)


def _leave(stopped: Event, ended: Event) -> None:
    """End the thread of the ServerApp, which Flower leaves alone and which would wait until its deadline, and Ray."""
    quiet_libraries(SILENT)  # of actors that ended with it
    stopped.set()
    ended.wait(END_S)
    ray.shutdown()


def engine_fault(error: BaseException, engine: Engine) -> Fault:
    """Return what Ray says that did not start or broke down; Flower wraps the cause in errors of its own."""
    while error.__cause__ is not None:
        error = error.__cause__
    value = (str(error).splitlines() or [type(error).__name__])[0]
    if engine.address != "local" and isinstance(error, ConnectionError | ValueError):
        return Fault(number=505, where=engine.address, value=value, did="Nothing was trained.")
    return Fault(number=503, what="Ray did not start, or broke down", value=value, did="Finished rounds are kept.")


def run_job(grid: Grid, job: Job, roster: Roster, on_event: Listener, on_scored: Scored = unheard) -> RunState:
    """Run one study on the connected nodes, from its committed state where there is one."""
    chosen = {node: name for node, name in roster.sites.items() if name in job.names}
    mine = Roster(chosen, {name: roster.sizes[name] for name in chosen.values()})
    alone = job.method == "alone"
    state = start_state(job.study)
    if alone:
        state.arrays = spread_out(state.arrays, job.names)
    if job.state_path.exists():
        state = RunState.load(job.state_path, job.study)
    strategy = Alone(job.study, mine) if alone else make_strategy(job.study, mine)

    def commit(now: RunState) -> None:
        commit_whole(now, job.state_path)
        scored = len(now.history) - (1 if now.closed else 2)  # sites score the model that they are given to train on
        if scored >= 0 and now.history[scored]["val_dice"] is not None:
            on_scored(job, now.history[scored])

    return run_rounds(
        grid,
        strategy,
        job.study,
        state,
        sites=chosen,
        commit=commit,
        poll_s=POLL_S,
        on_reply=lambda _, name: on_event(job, None, name),
        on_round=lambda record: on_event(job, record, ""),
    )


def commit_whole(state: RunState, path: Path) -> None:
    """Commit a round in which every virtual site took part.

    At real hospitals a round goes on without a site that fails. Here a failure is ours, most often memory: Flower puts
    a dead actor back into its pool and every later round would fail too, so the rehearsal stops before the commit.

    Raises
    ------
    IcmoeError
        503 with the sites that failed.
    """
    faults = state.history[-1]["faults"] if state.history else []
    if faults:
        value = ", ".join(f"{row['where']} (ICM{row['number']})" for row in faults)
        did = "The round was not kept; the rounds before it were."
        raise IcmoeError(Fault(number=503, what="virtual sites failed", value=value, did=did))
    state.commit(path)


def quiet_libraries(level: int = logging.ERROR) -> None:
    """Keep Flower's and Ray's own lines below a level off the screen."""
    for name in ("flwr", "ray"):
        logging.getLogger(name).setLevel(level)


def require_cluster(address: str) -> None:
    """Stop where nobody listens at the address of the Ray cluster; Ray itself would try for minutes.

    Raises
    ------
    IcmoeError
        505 with what the connection said.
    """
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", address)  # as Ray does
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host:
        return  # one on this machine
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CLUSTER_TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        value = error.strerror or str(error) if isinstance(error, OSError) else "not HOST:PORT"
        raise IcmoeError(Fault(number=505, where=address, value=value, did=NOT_STARTED)) from None

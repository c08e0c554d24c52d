"""One side of the simulation benchmark: rounds in which nobody trains, by the product or by Flower alone.

`python -m simulations.benchmarks.no_training --side ours --sites 100` prints JSON. Both sides run in Ray on the same number of
processors and send the tensors of the default model to every site and back. Ours is what a rehearsal runs: introduction,
digest of the study, checks at both ends, guard, router-aware average, commit to disk; only validation and training are left
out, a number that depends on the site is added to every value instead. Flower's is its own engine with `FedAvg`, without
evaluation, and a client that answers with the record that came. Both import the same libraries, PyTorch too.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
import typer
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from fl_client.app import incoming_of, model_of
from fl_client.egress import Request
from fl_client.local_round import size_of
from fl_client.manifest import Numbers, Outgoing
from fl_client.participant import Participant
from fl_server.app import start_state
from fl_server.round_log import RoundRecord
from icmoe.backbones import DEFAULT_WEIGHTS
from icmoe.data.slices import Slice
from icmoe.exchange import update_of
from icmoe.messages import DICE_KEY, LOSS_KEY, PATIENTS_KEY, SECONDS_KEY, SLICES_KEY, STEPS_KEY, USAGE_KEY
from icmoe.study import BackboneChoice, Study
from icmoe.usage import run_command
from icmoe.window import Window
from simulations.benchmarks.training_step import LABELS
from simulations.federation import Engine, Job, quiet_libraries, run_jobs, write_sites
from simulations.measuring import peak_bytes

SLICES = 10


def study_of(rounds: int) -> Study:
    """Return the default study."""
    backbone = BackboneChoice(digest=DEFAULT_WEIGHTS.digest)
    return Study(name="no-training", seed=1, rounds=rounds, labels=LABELS, backbone=backbone)


@dataclass(slots=True)
class Marks:
    """Clock and CPU seconds at the ends of rounds, and the peak of this process.

    Parameters
    ----------
    imported_mb
        Peak before the engine starts.
    round_bytes
        Of the tensors to and from all sites, where they are counted.
    wall_s, cpu_s
        At the end of each round; the latter of this process and all that it started.
    """

    imported_mb: float = 0.0
    round_bytes: int = 0
    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)

    def take(self) -> None:
        """Note the end of a round."""
        self.wall_s.append(time.perf_counter())
        self.cpu_s.append(cpu_of_tree_s())


def cpu_of_tree_s() -> float:
    """Return the CPU seconds of this process and of all that it started and that still run."""
    rows: dict[int, tuple[int, int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            values = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            continue
        rows[int(path.parent.name)] = (int(values[1]), int(values[11]) + int(values[12]))
    mine, grown = {os.getpid()}, True
    while grown:
        found = {number for number, (parent, _) in rows.items() if parent in mine} - mine
        mine |= found
        grown = bool(found)
    return sum(rows[number][1] for number in mine if number in rows) / os.sysconf("SC_CLK_TCK")


def train_nothing(request: Request) -> Outgoing:
    """Answer as a site that trained, with an update that is the same number everywhere."""
    start = incoming_of(request)
    model = model_of(request, start)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1e-6 * (1 + int(request.site.name) % 7))
    experts = request.study.model.experts
    numbers: Numbers = {
        SLICES_KEY: size_of(request.site, request.study),
        USAGE_KEY: [1.0 / experts] * experts,
        LOSS_KEY: 1.0,
        STEPS_KEY: 1,
        SECONDS_KEY: 0.0,
        DICE_KEY: 0.5,
        PATIENTS_KEY: 1,
    }
    return Outgoing(tensors=update_of(model, start, personal=False, shape=request.study.model), numbers=numbers)


def score_nothing(request: Request) -> Outgoing:
    """Answer as a site that scored."""
    del request
    return Outgoing(numbers={DICE_KEY: 0.5, PATIENTS_KEY: 1})


def sites_of(count: int, study: Study, folder: Path) -> list[Participant]:
    """Return sites that have one slice, which nobody opens."""
    one = Slice(
        site="none",
        patient="1",
        index=0,
        split="train",
        image=folder / "none.png",
        mask=folder / "none.png",
        image_digest="0" * 64,
        shape=(1, 1),
        window=Window(0.0, 1.0),
        spacing_mm=None,
    )
    shared = {"studies": (study,), "train": (one,), "val": (), "cache_folder": folder, "state_folder": folder}
    return [Participant(name=f"{number:04d}", exact_counts=True, **shared) for number in range(count)]  # type: ignore[arg-type]


def ours(sites: int, rounds: int, engine: Engine, marks: Marks) -> None:
    """Rehearse a study in which nobody trains."""
    study = study_of(rounds)
    with TemporaryDirectory() as name:
        folder = Path(name)
        everybody = sites_of(sites, study, folder)
        write_sites(folder / "sites.json", everybody)
        names = tuple(site.name for site in everybody)
        job = Job(method="router-aware", study=study, names=names, state_path=folder / "state.safetensors")

        def hear(_: Job, record: RoundRecord | None, __: str) -> None:
            if record is not None:
                marks.take()
                marks.round_bytes = record["bytes_up"] + record["bytes_down"]

        run_jobs([job], folder / "sites.json", engine, hear, handlers={"train": train_nothing, "evaluate": score_nothing})


def echo(message: Message, context: Context) -> Message:
    """Answer with the tensors as they came."""
    del context
    numbers = MetricRecord({"num-examples": SLICES, "train_loss": 1.0})
    return Message(RecordDict({"arrays": message.content["arrays"], "metrics": numbers}), reply_to=message)


class Marked(FedAvg):
    """Flower's FedAvg that notes when each round ended.

    Parameters
    ----------
    marks
        Where.
    """

    def __init__(self, marks: Marks) -> None:
        super().__init__(fraction_evaluate=0.0)
        self.marks = marks

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Aggregate, then note the time."""
        found = super().aggregate_train(server_round, replies)
        self.marks.take()
        return found


def flower(sites: int, rounds: int, engine: Engine, marks: Marks) -> None:
    """Let Flower's simulation run as many rounds over the same tensors."""
    quiet_libraries()
    client_app, server_app = ClientApp(), ServerApp()
    client_app.train()(echo)
    arrays = ArrayRecord({name: Array(tensor) for name, tensor in start_state(study_of(rounds)).arrays.items()})

    def serve(grid: Grid, context: Context) -> None:
        del context
        Marked(marks).start(grid, arrays, num_rounds=rounds)

    server_app.main()(serve)
    run_simulation(server_app, client_app, num_supernodes=sites, backend_config=engine.backend_config())  # type: ignore[arg-type]


def main(
    side: Annotated[str, typer.Option(help="ours or flower.")],
    sites: Annotated[int, typer.Option(min=1, help="Virtual sites.")] = 100,
    rounds: Annotated[int, typer.Option(min=2, help="Rounds; the first is not counted.")] = 3,
    cpus: Annotated[int, typer.Option(min=1, help="Processors.")] = 2,
) -> None:
    """Run one side and print what it took."""
    marks = Marks(imported_mb=peak_bytes() / 1e6)
    began = time.perf_counter()
    {"ours": ours, "flower": flower}[side](sites, rounds, Engine(cpus=cpus), marks)
    whole_s = time.perf_counter() - began
    found = {
        "round_s": [now - before for before, now in pairwise(marks.wall_s)],
        "round_cpu_s": [now - before for before, now in pairwise(marks.cpu_s)],
        "round_bytes": marks.round_bytes,
        "whole_s": whole_s,
        "imported_mb": marks.imported_mb,
        "peak_mb": peak_bytes() / 1e6,
    }
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    run_command(main)

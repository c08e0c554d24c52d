"""Whether memory grows with the rounds, at the coordinator and in the code that a site runs: bytes per round, with an interval.

`python simulations/benchmarks/memory.py --rounds 200` plays the rounds in this process over a wire that is a fake. The
coordinator has the strategy of a study with [privacy.server], four sites, of which one is always silent, and commits to
disk. The site trains a phantom hospital, with and without ledger and audit log. Resident memory is the kernel's figure for
what is this process's own (libraries' pages that are read for the first time do not count); traced memory is what Python
and NumPy hold. The slope is that of the means of ten blocks of rounds after a warm-up, with the 95 % interval of an
ordinary fit.

Last seen with ``--rounds 520 --warm-up 300 --what coord`` (the guard fills its memory for 256 before), bytes per round: 65 (4
to 127) resident, 27 (23 to 30) traced.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
import tracemalloc
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
import typer
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.task_identity import TaskIdentity
from rich.console import Console
from rich.table import Table
from scipy import stats

from fl_client.app import make_client_app
from fl_client.participant import Participant
from fl_server.app import make_strategy, start_state
from fl_server.receipts import Receipted
from fl_server.roster import Roster
from fl_server.round_strategy import RoundStrategy
from fl_server.rounds import run_rounds
from fl_server.run_state import RunState
from icmoe.backbone import backbone_digest, load_backbone
from icmoe.config import parse
from icmoe.data.folder import read_folder
from icmoe.errors import Fault, print_faults
from icmoe.exchange import global_state
from icmoe.features import FeatureCache
from icmoe.kinds import BALANCE_BIAS
from icmoe.messages import ARRAYS, CONFIG, NUMBERS, ROUND_KEY, STUDY_KEY, UPDATE
from icmoe.model import build_model
from icmoe.packing import unpack_records
from icmoe.prepare import encode_slices
from icmoe.study import Study
from icmoe.usage import run_command
from simulations.phantoms import PhantomSite, write_phantoms

SITES = {11: "Alder", 12: "Birch", 13: "Cedar", 14: "Silent"}
SILENT = "Silent"
SERVER = {"noise_multiplier": 1.0, "delta": 0.01, "sites": 4, "divisor": 1.0}
LOOSE = {"cap": 1.0, "min_contributors": 1, "shrinkage": False, "balance_step": 0.0}
BLOCKS = 10


@dataclass(frozen=True, slots=True)
class Slope:
    """Bytes per round with the ends of its 95 % interval."""

    slope: float
    low: float
    high: float


class Samples:
    """Bytes after each round, in arrays that are there from the start: a list of numbers would grow by 80 bytes a round itself.

    Parameters
    ----------
    rounds
        How many there will be.
    """

    def __init__(self, rounds: int) -> None:
        self.resident, self.traced = np.zeros(rounds), np.zeros(rounds)
        self._taken = 0

    def take(self) -> None:
        """Note what is held now."""
        gc.collect()
        _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
        if self._taken < len(self.resident):  # the closing evaluation is one more
            self.resident[self._taken] = (resident - shared) * 4096
            self.traced[self._taken] = tracemalloc.get_traced_memory()[0]
        self._taken += 1


def slope_of(values_bytes: Sequence[float] | npt.NDArray[np.float64], warm_up: int) -> Slope:
    """Return the slope of what follows the warm-up, from the means of equal blocks: neighbouring rounds are not independent."""
    kept = np.asarray(values_bytes[warm_up:], dtype=np.float64)
    length = len(kept) // BLOCKS
    block_means = kept[len(kept) - BLOCKS * length :].reshape(BLOCKS, length).mean(axis=1)
    fit = stats.linregress(np.arange(BLOCKS) * length, block_means)
    half = float(stats.t.ppf(0.975, BLOCKS - 2)) * fit.stderr
    return Slope(float(fit.slope), float(fit.slope - half), float(fit.slope + half))


def tiny_study(rounds: int, **changes: Any) -> Study:  # noqa: ANN401  # tables of a study
    """Return a study over the random test backbone."""
    values = {
        "name": "memory",
        "seed": 1,
        "rounds": rounds,
        "test_only": True,
        "deadline_s": 0.05,
        "labels": [{"name": "background", "values": [0]}, {"name": "lesion", "values": [1, 255]}],
        "backbone": {"name": "sam-vit-test", "digest": backbone_digest("sam-vit-test", None), "image_size": 32},
        "model": {"basic_experts": 1, "semantic_experts": 1, "adaptive_experts": 1, "bottleneck": 8},
    }
    return parse(Study, {**values, **changes}, where="memory")


class Wire:
    """As much of Flower's Grid as the rounds use; every site but the silent one answers at once with random numbers."""

    def __init__(self, study: Study) -> None:
        self.study, self._rng = study, np.random.default_rng(0)
        self._replies: dict[str, Message] = {}
        self._asked = 0

    def get_nodes(self) -> list[NodeInfo]:
        """Return all sites, connected."""
        return [NodeInfo(node_id=node, name=name, status="online") for node, name in SITES.items()]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Let the sites answer."""
        ids = []
        for message in messages:
            self._asked += 1
            message.metadata.__dict__["_message_id"] = f"{self._asked:064d}"
            ids.append(message.metadata.message_id)
            if SITES[message.metadata.dst_node_id] != SILENT:
                reply = Message(self._content(message), reply_to=message)
                reply.metadata.__dict__["_src_node_id"] = message.metadata.dst_node_id
                self._replies[message.metadata.message_id] = reply
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return what was answered to these."""
        return [self._replies.pop(number) for number in list(message_ids) if number in self._replies]

    def _content(self, message: Message) -> RecordDict:
        numbers: dict[str, Any] = {"val-dice": 0.5, "val-patients": 2}
        if message.metadata.message_type == "evaluate":
            return RecordDict({NUMBERS: MetricRecord(numbers)})
        content = RecordDict({ARRAYS: message.content.array_records[ARRAYS]})
        unpack_records(content)
        update = {
            name: Array(self._rng.normal(0.0, 0.01, array.shape).astype(np.float32))
            for name, array in content.array_records[ARRAYS].items()
            if name != BALANCE_BIAS
        }
        experts = self.study.model.experts
        numbers |= {"slices": 10, "usage": [1.0 / experts] * experts, "loss": 0.5, "steps": 3, "seconds": 0.1}
        return RecordDict({UPDATE: ArrayRecord(update), NUMBERS: MetricRecord(numbers)})


def at_coordinator(rounds: int, *, around: Callable[[RoundStrategy], RoundStrategy] = lambda strategy: strategy) -> Samples:
    """Play the rounds of the coordinator and return what was held after each.

    Parameters
    ----------
    rounds
        How many.
    around
        What is put around the strategy, to see whether a leak would show.
    """
    study = tiny_study(rounds, privacy={"server": SERVER}, aggregation=LOOSE)
    strategy, samples = around(make_strategy(study, Roster(SITES, dict.fromkeys(SITES.values(), 10)))), Samples(rounds)
    with tempfile.TemporaryDirectory() as folder:

        def commit(state: RunState) -> None:
            state.commit(Path(folder) / "study.state.safetensors", keep=3)
            samples.take()

        grid = Receipted(Wire(study), SITES, Path(folder) / "receipts")  # type: ignore[arg-type]
        run_rounds(grid, strategy, study, start_state(study), sites=SITES, commit=commit, poll_s=0.05)
    return samples


def at_site(rounds: int, *, audited: bool = True) -> Samples:
    """Let one site train the rounds, as its ClientApp does, and return what was held after each.

    Parameters
    ----------
    rounds
        How many.
    audited
        With ledger and audit log, which are read whole before each round, as at a hospital, where each round is a process of
        its own; without them, as in a rehearsal, where one process trains them all.
    """
    study, samples = tiny_study(rounds), Samples(rounds)
    context = Context(run_id=1, node_id=5, node_config={}, state=RecordDict(), run_config={})
    with tempfile.TemporaryDirectory() as folder:
        site = replace(_hospital(Path(folder), study), audited=audited)
        client_app = make_client_app(lambda *_: site)
        tensors = global_state(build_model(study, seed=1))
        for number in range(1, rounds + 1):
            arrays = ArrayRecord({name: Array(tensor.numpy()) for name, tensor in tensors.items()})
            config = ConfigRecord({STUDY_KEY: study.digest, ROUND_KEY: number})
            reply = client_app(
                Message(RecordDict({ARRAYS: arrays, CONFIG: config}), dst_node_id=5, message_type="train"), context
            )
            assert reply.has_content(), reply.error.reason
            del arrays, config, reply
            samples.take()
    return samples


def _hospital(folder: Path, study: Study) -> Participant:
    sites = [PhantomSite(name="Alder", train_patients=2, val_patients=1, test_patients=1)]
    write_phantoms(folder / "export", seed=1, size_px=32, sites=sites)
    data = read_folder(folder / "export", study.labels)["Alder"]
    backbone = load_backbone("sam-vit-test", image_size=32, device=torch.device("cpu"))
    encode_slices(data.slices, study, backbone, FeatureCache.of(folder / "cache", study))
    return Participant(
        name="Alder",
        studies=(study,),
        train=data.of("train"),
        val=data.of("val"),
        cache_folder=folder / "cache",
        state_folder=folder / "state",
    )


def update_bytes() -> int:
    """Return the size of one update of the study that is measured."""
    return sum(tensor.nbytes for name, tensor in start_state(tiny_study(1)).arrays.items() if name != BALANCE_BIAS)


MEASURED: Mapping[str, Callable[[int], Samples]] = {
    "coordinator": at_coordinator,
    "site of a rehearsal": partial(at_site, audited=False),
    "site of a hospital, in one process": at_site,
}


def main(
    rounds: Annotated[int, typer.Option(min=40, help="Rounds of each.")] = 200,
    warm_up: Annotated[
        int | None, typer.Option(help="Rounds that are not looked at. Default: a fifth. The guard fills its memory for 256.")
    ] = None,
    what: Annotated[str, typer.Option(help="Only what begins with this.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,  # noqa: FBT002
) -> None:
    """Print by how many bytes memory grows per round."""
    if warm_up is not None and not 0 <= warm_up <= rounds - 2 * BLOCKS:
        limit = f"0 to {rounds - 2 * BLOCKS}"
        print_faults([Fault(number=202, where="--warm-up", value=str(warm_up), limit=limit, did="Nothing was measured.")])
        raise typer.Exit(1)
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1  # Flower sets it in the processes that it starts
    torch.set_num_threads(1)
    rows: dict[str, dict[str, Slope]] = {}
    for name, measure in MEASURED.items():
        if name.startswith(what):
            resident = measure(rounds).resident  # alone: the tracer's own tables grow and count as resident
            tracemalloc.start()
            traced = measure(rounds).traced
            tracemalloc.stop()
            kinds = {"resident": resident, "traced": traced}
            rows[name] = {kind: slope_of(values, rounds // 5 if warm_up is None else warm_up) for kind, values in kinds.items()}
    if as_json:
        sys.stdout.write(
            json.dumps({name: {kind: asdict(one) for kind, one in row.items()} for name, row in rows.items()}) + "\n"
        )
        return
    size = update_bytes()
    table = Table("", "bytes per round", "95 % interval", "of an update", title=f"{rounds} rounds, an update has {size} bytes")
    for name, row in rows.items():
        for kind, one in row.items():
            table.add_row(
                f"{name}, {kind}", f"{one.slope:.0f}", f"{one.low:.0f} to {one.high:.0f}", f"{100 * one.slope / size:.2f} %"
            )
    Console(width=130).print(table)


if __name__ == "__main__":
    run_command(main)

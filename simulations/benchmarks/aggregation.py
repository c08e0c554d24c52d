"""The coordinator's arithmetic: router-aware FedAvg beside Flower's FedAvg and beside a bare loop, and its memory.

    python -m simulations.benchmarks --only aggregation

* **Time.** The same replies are given in turns to `RouterAware.aggregate_train` and to Flower's `FedAvg.aggregate_train`: what
  comes as bytes is read, checked (ours), summed and written as bytes again. The bare loop, `sum += share * update` in place,
  starts from arrays that are read already, checks nothing and writes nothing. Process CPU seconds, the least of the turns.
* **Memory.** What NumPy and Python take at most while a round is aggregated, beyond the replies, which Flower hands over as
  one list and which stay there meanwhile. Bytes traced in a process of its own for each number of sites.
"""

from __future__ import annotations

import logging
import tracemalloc
from collections.abc import Mapping, Sequence
from multiprocessing import get_context
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.task_identity import TaskIdentity

from fl_server.guard import Guard
from fl_server.round_strategy import RoundStrategy
from fl_server.router_aware import RouterAware
from icmoe.exchange import global_state
from icmoe.kinds import BALANCE_BIAS
from icmoe.messages import LOSS_KEY, NUMBERS, SECONDS_KEY, SLICES_KEY, STEPS_KEY, UPDATE, USAGE_KEY
from icmoe.model import build_model
from icmoe.study import Study
from simulations.benchmarks.row import Row
from simulations.benchmarks.training_step import lite_medsam
from simulations.measuring import least_cpu_s

SITES = 8
LARGE, LARGE_PARTS = 10_000_000, 10
AGAINST = {"Flower": "Flower's FedAvg.aggregate_train", "bare": "a bare in-place NumPy loop"}
MEMORY_SITES = (8, 32, 128)
Tensors = dict[str, npt.NDArray[Any]]


def rows(*, quick: bool) -> list[Row]:
    """Return the comparisons; `quick` takes a hundredth of the values, three turns and eight sites only."""
    study, _ = lite_medsam()
    real = tensors_of(study)
    each = LARGE // LARGE_PARTS // (100 if quick else 1)
    large = {f"experts.{part}.weight": np.zeros(each, np.float32) for part in range(study.model.experts)}
    large |= {f"head.{part}.weight": np.zeros(each, np.float32) for part in range(LARGE_PARTS - study.model.experts)}
    turns = 3 if quick else 25
    found = _times(f"{LARGE:,} float32", study, large, turns, [("Flower", 0.5), ("bare", 1.15)])
    found += _times(f"the model in its {len(real) - 1} tensors", study, real, turns, [("Flower", 0.2)])
    return found + [_memory(sites) for sites in (MEMORY_SITES[:1] if quick else MEMORY_SITES)]


def _times(what: str, study: Study, current: Tensors, turns: int, bars: Sequence[tuple[str, float]]) -> list[Row]:
    nodes = {node: f"site{node:03d}" for node in range(1, SITES + 1)}
    replies = [reply_of(study, current, node) for node in nodes]
    arrays = [{name: array.numpy() for name, array in reply.content.array_records[UPDATE].items()} for reply in replies]
    ours, deployed = (begun(strategy, current) for strategy in (RouterAware(study, nodes), guarded(study, nodes)))
    flower = FedAvg(weighted_by_key=SLICES_KEY)
    logging.getLogger("flwr").setLevel(logging.WARNING)

    def as_deployed() -> object:
        deployed.load_state({})  # or the guard would know the updates from the turn before
        return deployed.aggregate_train(1, replies)

    cpu_s = least_cpu_s(
        {
            "ours": lambda: ours.aggregate_train(1, replies),
            "deployed": as_deployed,
            "Flower": lambda: flower.aggregate_train(1, replies),
            "bare": lambda: bare_loop(current, arrays),
        },
        turns,
    )
    common: dict[str, Any] = {"what": f"router-aware aggregation, {SITES} updates of {what}", "ours": cpu_s["ours"]}
    note = f"with the guard's digests and norms {cpu_s['deployed']:.3g} CPU s"
    return [
        Row(against=AGAINST[side], limit=cpu_s[side], unit="CPU s", bar=bar, at_most=True, note=note, **common)
        for side, bar in bars
    ]


def _memory(sites: int) -> Row:
    with get_context("spawn").Pool(1) as process:
        peak_bytes, model_bytes, update_bytes = process.apply(peak_of, (sites,))
    return Row(
        what=f"aggregation's peak memory beyond the replies, {sites} sites",
        against="two models and one update",
        ours=peak_bytes,
        limit=2 * model_bytes + update_bytes,
        unit="bytes",
        bar=1.0,
        at_most=True,
        note=f"with the guard; Flower's list of replies itself is {sites * update_bytes:,} bytes",
    )


def peak_of(sites: int) -> tuple[int, int, int]:
    """Return the most bytes taken while a round of the real model is aggregated, and those of the model and of an update."""
    study, _ = lite_medsam()
    current = tensors_of(study)
    nodes = {node: f"site{node:03d}" for node in range(1, sites + 1)}
    replies = [reply_of(study, current, node) for node in nodes]
    strategy = begun(guarded(study, nodes), current)
    strategy.aggregate_train(1, replies)  # what is imported and kept from the first round on is not the round's
    strategy.load_state({})
    tracemalloc.start()
    arrays, _ = strategy.aggregate_train(1, replies)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    assert arrays is not None, strategy.report.faults
    update, model_bytes = replies[0].content.array_records[UPDATE], sum(tensor.nbytes for tensor in current.values())
    kept_bytes = model_bytes  # room for the moved tensors, from the round before
    return peak_bytes + kept_bytes, model_bytes, sum(len(array.data) for array in update.values())


def tensors_of(study: Study) -> Tensors:
    """Return the global tensors of a study's model."""
    return {name: tensor.numpy() for name, tensor in global_state(build_model(study, seed=1)).items()}


def guarded(study: Study, nodes: Mapping[int, str]) -> Guard:
    """Return the strategy as a coordinator runs it."""
    return Guard(RouterAware(study, nodes), study, nodes)


def begun(strategy: RoundStrategy, current: Tensors) -> RoundStrategy:
    """Return the strategy after it sent out a round's tensors."""
    arrays = ArrayRecord({name: Array(tensor) for name, tensor in current.items()})
    list(strategy.configure_train(1, arrays, ConfigRecord(), None))  # type: ignore[arg-type]  # none looks at the grid
    return strategy


def reply_of(study: Study, current: Tensors, node: int) -> Message:
    """Return a site's reply: small random updates, usage drawn from the simplex, a size of ten per node number."""
    rng = np.random.default_rng(node)
    update = {
        name: Array(rng.standard_normal(tensor.shape, dtype=np.float32) * np.float32(1e-4))
        for name, tensor in sorted(current.items())
        if name != BALANCE_BIAS
    }
    usage: list[float] = rng.dirichlet(np.ones(study.model.experts)).tolist()
    numbers = MetricRecord({SLICES_KEY: 10 * node, STEPS_KEY: 3, USAGE_KEY: usage, LOSS_KEY: 0.5, SECONDS_KEY: 1.0})
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1  # as Flower's process sets them
    asked = Message(RecordDict(), dst_node_id=node, message_type="train")
    reply = Message(RecordDict({UPDATE: ArrayRecord(update), NUMBERS: numbers}), reply_to=asked)
    reply.metadata.__dict__["_src_node_id"] = node  # as if it came from there
    return reply


def bare_loop(current: Tensors, arrays: Sequence[Tensors]) -> Tensors:
    """Return the plain mean added to each tensor, one array after the other."""
    moved = {}
    for name, tensor in current.items():
        total, share = tensor.copy(), np.float32(1 / len(arrays))
        for update in arrays:
            if name in update:
                total += share * update[name]
        moved[name] = total
    return moved

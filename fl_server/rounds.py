"""The rounds of a study over a Flower Grid, committed to disk after each one.

A round asks every site once: the site scores the incoming model on its own validation patients, trains, and answers
with both. The validation score of round r therefore arrives with round r + 1, and one evaluation closes the study;
this halves what is sent down and saves a process start per site and round.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fl_server.exchanging import ask
from fl_server.replies import mean_loss
from fl_server.roster import await_online, online
from fl_server.router_aware import RoundReport, Tensors
from icmoe.atomic import write_atomically
from icmoe.errors import Fault, IcmoeError
from icmoe.exchange import DICE_KEY, LOSS_KEY, NUMBERS, PATIENTS_KEY
from icmoe.model import names_of
from icmoe.study import Study

RoundRecord = dict[str, Any]


class RoundStrategy(Protocol):
    """A Flower strategy that also reports what it saw."""

    @property
    def report(self) -> RoundReport:
        """What the strategy saw in the last round."""

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """Return the round's training messages."""

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the new global arrays."""

    def configure_evaluate(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """Return the closing evaluation messages."""

    def state(self) -> Tensors:
        """Return what the strategy must remember between rounds."""

    def load_state(self, state: Tensors) -> None:
        """Take it back from a commit."""


@dataclass(slots=True)
class RunState:
    """What is committed after each round.

    Parameters
    ----------
    study_digest
        Of the study that this is the state of.
    arrays
        Global tensors.
    round
        Rounds done.
    history
        One record per round.
    extra
        State of a server optimiser.
    closed
        Whether the closing evaluation is in the history.
    """

    study_digest: str
    arrays: Tensors
    round: int = 0
    history: list[RoundRecord] = field(default_factory=list)
    extra: Tensors = field(default_factory=dict)
    closed: bool = False

    def commit(self, path: Path) -> None:
        """Write the state atomically."""
        header = {"study": self.study_digest, "round": self.round, "history": self.history, "closed": self.closed}
        tensors = {**{f"global.{name}": value for name, value in self.arrays.items()}, **self.extra}
        write_atomically(path, save(dict(sorted(tensors.items())), metadata={"state": json.dumps(header)}))

    @staticmethod
    def load(path: Path, study: Study) -> RunState:
        """Return the committed state.

        Raises
        ------
        IcmoeError
            502 where the file is damaged or belongs to another study.
        """
        try:
            with safe_open(path, framework="numpy") as file:
                header = json.loads(file.metadata()["state"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise IcmoeError(Fault(number=502, where=path.name, what="committed state is damaged", value=str(error))) from None
        if header["study"] != study.digest:
            value, limit = header["study"][:12], study.digest[:12]
            raise IcmoeError(
                Fault(number=502, where=path.name, what="committed state of another study", value=value, limit=limit)
            )
        arrays = {name.removeprefix("global."): value for name, value in tensors.items() if name.startswith("global.")}
        extra = {name: value for name, value in tensors.items() if not name.startswith("global.")}
        return RunState(header["study"], arrays, header["round"], header["history"], extra, header["closed"])


def run_rounds(
    grid: Grid,
    strategy: RoundStrategy,
    study: Study,
    state: RunState,
    *,
    sites: Mapping[int, str],
    commit: Callable[[RunState], None],
    poll_s: float = 1.0,
    on_reply: Callable[[int, str], None] | None = None,
    on_round: Callable[[RoundRecord], None] | None = None,
) -> RunState:
    """Run the rounds that are left and the closing evaluation; `state` is moved on and committed after each.

    Parameters
    ----------
    grid, strategy, study
        As in Flower.
    state
        Start or committed state.
    sites
        Names by node.
    commit
        Called with the state after each round; must be atomic.
    poll_s
        Seconds between looks for replies.
    on_reply
        Called with (round, site) as replies arrive.
    on_round
        Called with each round's record.

    Raises
    ------
    IcmoeError
        501 where a round brings no usable update at all or fewer sites than the quorum are connected until the deadline;
        what was committed stays.
    """

    def heard(number: int) -> Callable[[Message], None]:
        return lambda reply: on_reply(number, sites.get(reply.metadata.src_node_id, "?")) if on_reply is not None else None

    strategy.load_state(state.extra)
    while state.round < study.rounds:
        number = state.round + 1
        began = time.perf_counter()
        arrays = ArrayRecord({name: Array(tensor) for name, tensor in state.arrays.items()})
        reached = await_online(grid, min(study.quorum, len(sites)), deadline_s=study.deadline_s, poll_s=poll_s, among=sites)
        messages = reachable(strategy.configure_train(number, arrays, ConfigRecord(), grid), reached)
        replies = ask(grid, messages, deadline_s=study.deadline_s, poll_s=poll_s, on_reply=heard(number))
        trained_s = time.perf_counter() - began
        replies = [reply for reply in replies if reply.metadata.src_node_id in sites]
        moved, _ = strategy.aggregate_train(number, replies)
        strategy.report.faults += silences(sites, reached, replies)
        if not strategy.report.updates:
            raise IcmoeError(Fault(number=501, where=f"round {number}"), *strategy.report.faults)
        if moved is not None:
            state.arrays = {name: array.numpy() for name, array in moved.items()}
        state.extra = strategy.state()
        note_validation(state, _validation(replies, sites))
        seconds = {"train": trained_s, "aggregate": time.perf_counter() - began - trained_s}
        size_down_bytes = sum(len(array.data) for array in arrays.values())
        state.history.append(round_record(number, strategy.report, study, size_down_bytes, seconds))
        state.round = number
        commit(state)
        if on_round is not None:
            on_round(state.history[-1])
    if not state.closed:
        arrays = ArrayRecord({name: Array(tensor) for name, tensor in state.arrays.items()})
        messages = reachable(strategy.configure_evaluate(study.rounds, arrays, ConfigRecord(), grid), online(grid))
        replies = ask(grid, messages, deadline_s=study.deadline_s, poll_s=poll_s, on_reply=heard(study.rounds))
        note_validation(state, _validation(replies, sites))
        state.closed = True
        commit(state)
    return state


def reachable(messages: Iterable[Message], nodes: Container[int]) -> list[Message]:
    """Return the messages to connected nodes: Flower answers one to another node only after its own deadline."""
    return [message for message in messages if message.metadata.dst_node_id in nodes]


def silences(sites: Mapping[int, str], reached: Container[int], replies: Iterable[Message]) -> list[Fault]:
    """Return a fault per site that is not connected or did not answer; what Flower answers in its stead does not count."""
    answered = {reply.metadata.src_node_id for reply in replies}
    faults = []
    for node, name in sorted(sites.items(), key=lambda item: item[1]):
        if node not in reached:
            faults.append(Fault(number=332, where=name, did="The round went on without the site."))
        elif node not in answered:
            what = "site did not answer before the deadline"
            faults.append(Fault(number=304, where=name, what=what, did="The round went on without the site."))
    return faults


def _validation(replies: Iterable[Message], sites: Mapping[int, str]) -> dict[str, tuple[float, int]]:
    """Return validation Dice and patients per site that has validation patients."""
    found = {}
    for reply in replies:
        numbers = reply.content.get(NUMBERS) if reply.has_content() else None
        if isinstance(numbers, MetricRecord) and numbers.get(PATIENTS_KEY):
            dice, patients = numbers.get(DICE_KEY), numbers.get(PATIENTS_KEY)
            if isinstance(dice, float) and isinstance(patients, int) and 0.0 <= dice <= 1.0:
                found[sites.get(reply.metadata.src_node_id, "")] = (dice, patients)
    return found


def note_validation(state: RunState, found: Mapping[str, tuple[float, int]]) -> None:
    """Enter the scores of the model that the last recorded round left behind."""
    if not state.history or not found:
        return
    record = state.history[-1]
    for site, (dice, _) in found.items():
        if site in record["sites"]:
            record["sites"][site]["val_dice"] = dice
    patients = sum(count for _, count in found.values())
    record["val_dice"] = sum(dice * count for dice, count in found.values()) / patients


def round_record(
    number: int, report: RoundReport, study: Study, size_down_bytes: int, seconds: Mapping[str, float]
) -> RoundRecord:
    """Return the record of a round as plain values."""
    experts = names_of(study.model)
    sites = {
        update.site: {
            "loss": update.loss,
            "val_dice": None,
            "usage": list(update.usage_M),
            "steps": update.steps,
            "seconds": update.train_s,
            "bytes_up": update.size_bytes,
            "bytes_down": size_down_bytes,
        }
        for update in report.updates
    }
    shares: dict[str, dict[str, float]] = {}
    if report.weights is not None:
        names = [update.site for update in report.updates]
        shares = {
            expert: dict(zip(names, report.weights.share_SM[:, index].tolist(), strict=True))
            for index, expert in enumerate(experts)
        }
    return {
        "round": number,
        "sites": sites,
        LOSS_KEY: mean_loss(report.updates),
        "val_dice": None,
        "usage_spread": report.spread,
        "expert_weights": shares,
        "bytes_up": sum(update.size_bytes for update in report.updates),
        "bytes_down": size_down_bytes * len(report.updates),
        "seconds": dict(seconds),
        "faults": [fault.record() for fault in report.faults],
    }

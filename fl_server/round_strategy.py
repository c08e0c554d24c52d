"""What the rounds ask of a strategy, and what a strategy reports of a round."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid

from fl_server.replies import Update
from fl_server.weights import ExpertWeights, usage_spread
from icmoe.errors import Fault
from icmoe.packing import NUMPY, bytes_of

Tensors = dict[str, npt.NDArray[np.float32]]
State = dict[str, npt.NDArray[Any]]
FLOAT32_NAME = np.dtype(np.float32).name


@dataclass(slots=True)
class RoundReport:
    """What the strategy saw in a round.

    Parameters
    ----------
    updates
        Accepted, in site order, without their tensors.
    faults
        One per site that failed or was refused.
    weights
        None without experts, below the quorum, and where only sums were looked at.
    privacy
        What the rounds have spent; None without privacy at the server.
    """

    updates: list[Update] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    weights: ExpertWeights | None = None
    privacy: dict[str, str | float] | None = None

    @property
    def spread(self) -> float:
        """Spread of usage between sites."""
        return usage_spread(np.array([update.usage_M for update in self.updates]))


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

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return the closing evaluation's mean scores."""

    def state(self) -> State:
        """Return what the strategy must remember between rounds."""

    def load_state(self, state: State) -> None:
        """Take it back from a commit."""


def unheard(*_: object) -> None:
    """Take any event and do nothing: the default listener."""


def record_of(tensors: Tensors) -> ArrayRecord:
    """Return the record of ``Array(tensor)`` by name, made faster.

    Flower's constructors would write a header for each tensor instead of one for each shape, and make every array twice.
    """
    record = ArrayRecord()
    for name, tensor in tensors.items():
        record[name] = Array(FLOAT32_NAME, tensor.shape, NUMPY, bytes_of(tensor))
    return record

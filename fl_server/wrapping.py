"""A strategy around a strategy: everything is handed on but what the wrapper is there for."""

from __future__ import annotations

from collections.abc import Iterable

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fl_server.round_strategy import RoundReport, RoundStrategy, State, Tensors


class Wrapping(Strategy):
    """Hand on every call.

    Parameters
    ----------
    inner
        Any strategy of this package.
    """

    def __init__(self, inner: RoundStrategy) -> None:
        self.inner = inner
        self.report = RoundReport()
        self._current: Tensors = {}

    def summary(self) -> None:
        """Print nothing: the caller shows the study."""

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """Remember the round's arrays and delegate."""
        self._current = {name: array.numpy() for name, array in arrays.items()}
        return self.inner.configure_train(server_round, arrays, config, grid)

    def configure_evaluate(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """Delegate."""
        return self.inner.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Delegate."""
        moved = self.inner.aggregate_train(server_round, replies)
        self.report = self.inner.report
        return moved

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Delegate."""
        return self.inner.aggregate_evaluate(server_round, replies)

    def state(self) -> State:
        """Return the wrapped strategy's state."""
        return self.inner.state()

    def load_state(self, state: State) -> None:
        """Hand a commit's state on."""
        self.inner.load_state(state)

"""FedAdam and FedYogi over router-aware FedAvg, with Flower's own mathematics.

Reddi et al., arXiv 2003.00295, algorithm 2. Flower's classes average the replies and then take an adaptive step.
Handed one reply that holds the wrapped strategy's aggregate, their average is the identity and their step is taken
as published. What the mean leaves as it is, such as an expert that too few sites used, is kept with its moments: momentum
alone moves nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAdam, FedYogi

from fl_server.aggregate import flower_reply
from fl_server.round_strategy import State, Tensors
from fl_server.router_aware import RouterAware
from fl_server.wrapping import Wrapping
from icmoe.kinds import BALANCE_BIAS

FLOWER_STRATEGIES: dict[str, type[FedAdam] | type[FedYogi]] = {"adam": FedAdam, "yogi": FedYogi}


class ServerOptimized(Wrapping):
    """Take the wrapped strategy's mean update as the pseudo-gradient of an adaptive step.

    Parameters
    ----------
    inner
        The strategy whose study names the optimiser "adam" or "yogi".
    """

    def __init__(self, inner: RouterAware) -> None:
        super().__init__(inner)
        settings = inner.study.aggregation
        self._flower = FLOWER_STRATEGIES[settings.optimizer](eta=settings.server_learning_rate, tau=1e-3)

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """Remember the round's arrays for Flower's class and ask the sites."""
        messages = super().configure_train(server_round, arrays, config, grid)
        self._flower.current_arrays = {name: tensor for name, tensor in self._current.items() if name != BALANCE_BIAS}
        return messages

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the arrays after the adaptive step, or None below the quorum."""
        arrays, metrics = super().aggregate_train(server_round, replies)
        if arrays is None:
            return None, metrics
        trained = ArrayRecord({name: array for name, array in arrays.items() if name != BALANCE_BIAS})
        kept = {name for name, array in trained.items() if np.array_equal(array.numpy(), self._current[name])}
        before = self._moments()
        stepped, _ = self._flower.aggregate_train(server_round, [flower_reply(trained, "num-examples", 1)])
        assert stepped is not None
        for now, former in zip(self._moments(), before, strict=True):
            now |= {name: former[name] for name in kept & former.keys()}
        # Flower's learning rate is a float64 scalar and lifts the tensors to float64; the model stays float32.
        moved = {name: Array(array.numpy().astype(np.float32)) for name, array in stepped.items() if name not in kept}
        return ArrayRecord({name: moved.get(name, array) for name, array in arrays.items()}), metrics

    def _moments(self) -> tuple[Tensors, Tensors]:
        """Return Flower's moments, which it replaces with each step."""
        return self._flower.m_t or {}, self._flower.v_t or {}

    def state(self) -> State:
        """Return both moments by tensor name, for the checkpoint."""
        moments = zip("mv", self._moments(), strict=True)
        return {f"optimizer.{kind}.{name}": np.asarray(value) for kind, part in moments for name, value in part.items()}

    def load_state(self, state: State) -> None:
        """Take the moments back from a checkpoint."""
        self._flower.m_t, self._flower.v_t = (_part(state, kind) or None for kind in ("m", "v"))


def _part(state: State, kind: str) -> Tensors:
    prefix = f"optimizer.{kind}."
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}

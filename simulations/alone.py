"""Training without a federation, run on the same engine: each site alone, and all data together.

Every node keeps its own model. The strategy's arrays are all of them side by side, named "site|tensor", so that
rounds, commits and resume work as for any other strategy.
"""

from __future__ import annotations

from collections.abc import Iterable

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fl_server.roster import Roster
from fl_server.round_log import RoundRecord
from fl_server.round_strategy import RoundReport, State, Tensors
from fl_server.router_aware import RouterAware
from icmoe.study import Study

POOLED = "(pooled)"


def spread_out(tensors: Tensors, names: Iterable[str]) -> Tensors:
    """Return one copy of the tensors per site, named "site|tensor"."""
    return {f"{site}|{name}": tensor for site in names for name, tensor in tensors.items()}


def of_site(tensors: Tensors, site: str) -> Tensors:
    """Return the tensors of one site under their own names."""
    prefix = f"{site}|"
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def part_of(history: Iterable[RoundRecord], names: tuple[str, ...]) -> list[RoundRecord]:
    """Return the rounds of some nodes of an "alone" job; nothing travels there, so no bytes."""
    rounds = []
    for record in history:
        sites = {name: {**row, "bytes_up": 0, "bytes_down": 0} for name, row in record["sites"].items() if name in names}
        losses = [row["loss"] for row in sites.values()]
        dice = [row["val_dice"] for row in sites.values() if row["val_dice"] is not None]
        rounds.append(
            {
                **record,
                "sites": sites,
                "loss": sum(losses) / len(losses) if losses else None,
                "val_dice": sum(dice) / len(dice) if dice else None,
                "usage_spread": None,
                "bytes_up": 0,
                "bytes_down": 0,
                "seconds": {"train": sum(row["seconds"] for row in sites.values()), "aggregate": 0.0},
            }
        )
    return rounds


def by_method(method: str, record: RoundRecord) -> dict[str, RoundRecord]:
    """Return a round of a job by the methods that it trains: those of an "alone" job are two, and no number is of both."""
    if method != "alone":
        return {method: record}
    names = {"local": tuple(name for name in record["sites"] if name != POOLED), "pooled": (POOLED,)}
    parts = {name: part_of([record], sites)[0] for name, sites in names.items()}
    return {name: part for name, part in parts.items() if part["sites"]}


class Alone(Strategy):
    """One single-site strategy per node.

    Parameters
    ----------
    study
        The study that all of them follow.
    roster
        The nodes.
    """

    def __init__(self, study: Study, roster: Roster) -> None:
        # The largest site first: no core idles at the end of a round.
        order = sorted(roster.sites.items(), key=lambda item: (-roster.sizes[item[1]], item[1]))
        self._strategies = {name: RouterAware(study, {node: name}, roster.sizes) for node, name in order}
        self._nodes = {name: node for node, name in order}
        self.report = RoundReport()

    def summary(self) -> None:
        """Print nothing."""

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> list[Message]:
        """Return to each node its own model."""
        del config
        return [
            message
            for name, strategy in self._strategies.items()
            for message in strategy.configure_train(server_round, _own(arrays, name), ConfigRecord(), grid)
        ]

    def configure_evaluate(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> list[Message]:
        """Return to each node its own model, for scoring."""
        del config
        return [
            message
            for name, strategy in self._strategies.items()
            for message in strategy.configure_evaluate(server_round, _own(arrays, name), ConfigRecord(), grid)
        ]

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return every model after its own site's update; a site that failed keeps its model."""
        received = list(replies)
        self.report = RoundReport()
        moved: dict[str, ArrayRecord] = {}
        for name, strategy in self._strategies.items():
            mine = [reply for reply in received if reply.metadata.src_node_id == self._nodes[name]]
            arrays, _ = strategy.aggregate_train(server_round, mine)
            self.report.updates += strategy.report.updates
            self.report.faults += strategy.report.faults
            moved[name] = strategy.unmoved() if arrays is None else arrays
        self.report.updates.sort(key=lambda update: update.site)
        arrays = ArrayRecord({f"{name}|{key}": array for name, record in moved.items() for key, array in record.items()})
        return arrays, None

    def state(self) -> State:
        """Return nothing: each round stands for itself."""
        return {}

    def load_state(self, state: State) -> None:
        """Take nothing back."""
        del state

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return nothing: each site's score stands for itself."""
        del server_round, replies
        return None


def _own(arrays: ArrayRecord, site: str) -> ArrayRecord:
    prefix = f"{site}|"
    return ArrayRecord({name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)})

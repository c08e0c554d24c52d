"""A Grid in front of a Grid: everything is handed on but what the one in front is there for."""

from __future__ import annotations

from collections.abc import Iterable

from flwr.app import Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid as FlowerGrid
from flwr.supercore.run import Run


class InFront(FlowerGrid):
    """Hand on every call.

    Parameters
    ----------
    grid
        The Grid that sends and receives.
    """

    def __init__(self, grid: FlowerGrid) -> None:
        self._grid = grid

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Delegate."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Delegate."""
        return self._grid.pull_messages(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Not in use: `fl_server/exchanging.py` sends and receives by itself."""
        raise NotImplementedError

    @property
    def run(self) -> Run:
        """The Grid's run."""
        return self._grid.run

    def set_run(self, run: Run) -> None:
        """Set the Grid's run."""
        self._grid.set_run(run)

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Return the Grid's message."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """Return the Grid's nodes."""
        return self._grid.get_node_ids()

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Return the Grid's nodes with their names."""
        return self._grid.get_nodes()

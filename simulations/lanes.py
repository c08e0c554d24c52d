"""Many virtual sites on few of Flower's SuperNodes: each plays one site after the other.

Flower's simulation asks for every node, ten times a second, whether one of all messages is for it, and holds every message
until the round's last one is answered. A thousand nodes that are asked at once are a million looks and a thousand updates in
memory. Here as many messages are under way as there are SuperNodes, the next one leaves when an answer came, and what came
waits on disk.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import suppress
from itertools import count
from pathlib import Path

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid

from fl_client.app import Handler, SiteOf, make_client_app
from fl_server.grid import InFront
from simulations.in_store import in_store
from simulations.on_disk import to_disk

LANES = 32
"""SuperNodes at most. Flower hands each one message in 0.1 s."""
PARTITION = "partition-id"


class AnySite(ClientApp):
    """A ClientApp that is, for each message, the site whose number stands in the message's group.

    Parameters
    ----------
    site_of, handlers
        As for `make_client_app`.
    folder
        Where large answers are left, for `Lanes`: they would pass through Ray's store and through two processes otherwise.
    """

    def __init__(self, site_of: SiteOf, handlers: Mapping[str, Handler] | None, folder: Path) -> None:
        super().__init__()
        self._given = (site_of, handlers, folder)
        self._folder = folder
        self._app = make_client_app(site_of, handlers)

    def __reduce__(self) -> tuple[type[AnySite], tuple[SiteOf, Mapping[str, Handler] | None, Path]]:
        """Travel to the actors as what it was made of: it does so with every message."""
        return AnySite, self._given

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer as the site that is asked."""
        context.node_config[PARTITION] = int(message.metadata.group_id)
        reply = self._app(message, context)
        with suppress(OSError):  # what could not be written travels in the answer, and whoever takes it says why
            to_disk(reply, self._folder)
        return reply


class Lanes(InFront):
    """The virtual sites as nodes 1 to n, in front of a Grid of fewer nodes.

    Parameters
    ----------
    grid
        Flower's.
    nodes
        Its nodes.
    sites
        How many there are.
    folder
        Where large answers wait until they are read.
    """

    def __init__(self, grid: Grid, nodes: Iterable[int], sites: int, folder: Path) -> None:
        super().__init__(grid)
        self._folder, self._sites = folder, range(1, sites + 1)
        self._free = deque(nodes)
        self._queue = deque[Message]()
        self._asked: dict[str, tuple[Message, int]] = {}
        self._numbers = count(1)
        self._put: tuple[RecordDict, RecordDict] | None = None

    def get_node_ids(self) -> Iterable[int]:
        """Return the virtual sites."""
        return self._sites

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Return the virtual sites; they have no registered names."""
        return [NodeInfo(node_id=node, status="online") for node in self._sites]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Take messages and send as many as there are SuperNodes free, in their order."""
        asked = list(messages)
        for message in asked:
            message.metadata.__dict__["_message_id"] = f"virtual-{next(self._numbers)}"
        self._queue.extend(asked)
        self._send()
        return [message.metadata.message_id for message in asked]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the answers that came since, to whichever messages, and send the next ones."""
        del message_ids
        if not self._asked:
            return []
        replies = [self._taken(reply) for reply in self._grid.pull_messages(list(self._asked))]
        self._send()
        return replies

    def _send(self) -> None:
        ready = [self._queue.popleft() for _ in range(min(len(self._free), len(self._queue)))]
        lanes = [self._free.popleft() for _ in ready]
        sent = [self._as_played(message, lane) for message, lane in zip(ready, lanes, strict=True)]
        for number, message, lane in zip(self._grid.push_messages(sent), ready, lanes, strict=True):
            self._asked[number] = message, lane

    def _as_played(self, message: Message, lane: int) -> Message:
        """Return a message to a site as one to the SuperNode that plays it; content that many share goes to Ray's store once."""
        about = message.metadata
        if self._put is None or self._put[0] is not message.content:
            self._put = message.content, in_store(message.content)
        group = str(about.dst_node_id - 1)
        return Message(self._put[1], dst_node_id=lane, message_type=about.message_type, ttl=about.ttl, group_id=group)

    def _taken(self, reply: Message) -> Message:
        """Return a reply as one of the site that was asked, with its tensors on disk."""
        message, lane = self._asked.pop(reply.metadata.reply_to_message_id)
        self._free.append(lane)
        asked = message.metadata
        reply.metadata.__dict__ |= {"_src_node_id": asked.dst_node_id, "_reply_to_message_id": asked.message_id}
        for array in to_disk(reply, self._folder):
            array.own()
        return reply

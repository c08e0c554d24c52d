"""Messages that a site took and lost.

Flower delivers a message once: a SuperNode that is killed with it, or restarted, has it no more and does not say so. The
node is then seen to have connected anew after the message was made.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from datetime import datetime

from flwr.app import Array, ArrayRecord, Message
from flwr.serverapp import Grid

from icmoe.packing import pack_records

LOOK_S = 5.0
"""Seconds between looks at the nodes: each is a call of the SuperLink."""


def send_lost_again(grid: Grid, waiting: dict[str, Message], connected: dict[int, float]) -> None:
    """Send the messages again whose site connected anew since; in `waiting` they change their identifiers.

    All but the closing evaluation's: a site that has the update answers with the same bytes, and who it is and what it holds
    costs nothing, but a noised score is paid for each time. An answer that was under way is not looked for any more.

    Parameters
    ----------
    grid
        Flower's Grid.
    waiting
        Messages without an answer, by identifier.
    connected
        When each node had connected last at the look before, which is noted here: where the clock was set back meanwhile, a
        message seems older than a connection for long, and is still not lost again with each look.
    """
    activated = _last_activated(grid) if waiting else {}
    for identifier, message in list(waiting.items()):
        about = message.metadata
        last = activated.get(about.dst_node_id, 0.0)
        anew = last != connected[about.dst_node_id] if about.dst_node_id in connected else last > about.created_at
        if about.message_type != "evaluate" and last and anew:
            about.created_at = time.time()  # the message stays the same object, by which the strategy knows it
            pack_records(message.content, ArrayRecord, Array)
            for fresh in grid.push_messages([message]):
                del waiting[identifier]
                waiting[fresh] = message
    connected |= activated


def _last_activated(grid: Grid) -> dict[int, float]:
    """Return when each connected node connected last, seconds since the epoch; a simulation does not say."""
    times: Iterable[tuple[int, str]] = (
        (node.node_id, node.last_activated_at) for node in grid.get_nodes() if node.status == "online"
    )
    return {node: datetime.fromisoformat(text).timestamp() for node, text in times if text}

"""Messages out, replies in, with a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from flwr.app import Message
from flwr.serverapp import Grid


def ask(
    grid: Grid,
    messages: Iterable[Message],
    *,
    deadline_s: float,
    poll_s: float = 1.0,
    on_reply: Callable[[Message], None] | None = None,
) -> list[Message]:
    """Return the replies that arrive before the deadline.

    Parameters
    ----------
    grid
        Flower's Grid.
    messages
        One per node.
    deadline_s
        Seconds after which the wait ends, whoever is missing.
    poll_s
        Seconds between looks.
    on_reply
        Called with each reply as it arrives.
    """
    ends = time.monotonic() + deadline_s
    waiting = set(grid.push_messages(messages))
    replies: list[Message] = []
    while waiting and time.monotonic() < ends:
        for reply in grid.pull_messages(waiting):
            waiting.discard(reply.metadata.reply_to_message_id)
            replies.append(reply)
            if on_reply is not None:
                on_reply(reply)
        if waiting:
            time.sleep(poll_s)
    return replies

"""Messages out, replies in, with a deadline; their tensors travel packed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from flwr.app import Array, ArrayRecord, Message
from flwr.serverapp import Grid

from icmoe.packing import pack_records, unpack_records


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
    questions = list(messages)
    for question in questions:  # they may share their content, which is then packed once
        pack_records(question.content, ArrayRecord, Array)
    waiting = set(grid.push_messages(questions))
    replies: list[Message] = []
    while waiting and time.monotonic() < ends:
        for reply in grid.pull_messages(waiting):
            waiting.discard(reply.metadata.reply_to_message_id)
            if reply.has_content():
                unpack_records(reply.content, ArrayRecord, Array)
            replies.append(reply)
            if on_reply is not None:
                on_reply(reply)
        if waiting:
            time.sleep(poll_s)
    return replies

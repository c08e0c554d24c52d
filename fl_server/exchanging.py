"""Messages out, replies in, with a deadline; their tensors travel packed, and replies stay so until they are read."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from flwr.app import Array, ArrayRecord, Message
from flwr.serverapp import Grid

from fl_server.lost import LOOK_S, send_lost_again
from icmoe.packing import pack_records

SPARE_S = 3600.0
"""For so long after the deadline Flower keeps a question and its answers; by itself it drops both after twelve hours."""


def ask(
    grid: Grid,
    messages: Iterable[Message],
    *,
    deadline_s: float,
    poll_s: float = 1.0,
    on_reply: Callable[[Message], None] | None = None,
    late: set[str] | None = None,
) -> list[Message]:
    """Return the replies that arrive before the deadline, and late ones to earlier messages that come meanwhile.

    What a site lost by being restarted is sent to it again.

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
    late
        Earlier messages without an answer; those of this call that stay without one are added.
    """
    questions = list(messages)
    for question in questions:  # they may share their content, which is then packed once
        pack_records(question.content, ArrayRecord, Array)
        question.metadata.ttl = max(question.metadata.ttl, deadline_s + SPARE_S)
    waiting = dict(zip(grid.push_messages(questions), questions, strict=False))
    overdue = set[str]() if late is None else late
    next_look, ends = time.monotonic() + LOOK_S, time.monotonic() + deadline_s
    replies, connected = list[Message](), dict[int, float]()
    while True:
        for reply in grid.pull_messages({*waiting, *overdue}):
            if on_reply is not None and reply.metadata.reply_to_message_id in waiting:
                on_reply(reply)
            waiting.pop(reply.metadata.reply_to_message_id, None)
            overdue.discard(reply.metadata.reply_to_message_id)
            replies.append(reply)
        if not waiting or time.monotonic() >= ends:
            break
        if time.monotonic() >= next_look:
            send_lost_again(grid, waiting, connected)
            next_look = time.monotonic() + LOOK_S
        time.sleep(poll_s)
    overdue.update(waiting)
    return replies

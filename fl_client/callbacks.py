"""What the site adds to Flower's connection to the coordinator, whatever passes through it."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
from flwr.app import Message

from fl_client.answering import PART_S, Answer
from fl_client.watchdog import CONNECTION_ENDED, leave
from icmoe.errors import Fault

log = logging.getLogger("fl_client")

Received = tuple[Message, Any]
Connection = tuple[Any, ...]
Connect = Callable[..., Any]

LONGEST_VALUE = 200
_LABEL = re.compile(r"[\w.:-]{0,128}", re.ASCII)


def watched(connect: Connect) -> Connect:
    """Return Flower's connection to the coordinator, held to labels that Flower may log, and saying why it was lost.

    It ends the process where an answer was announced whose parts never come: Flower would wait for them for ever.

    Parameters
    ----------
    connect
        Flower's context manager of callbacks. It swallows what ends the connection, and its program then just returns.
    """

    @contextmanager
    def connection(*arguments: Any, **settings: Any) -> Iterator[Connection]:  # noqa: ANN401  (Flower's own signature)
        with connect(*arguments, **settings) as (node_id, receive, send, get_run, get_fab, pull, push, confirm):
            answer = Answer(_end, part_s=PART_S)
            asking, announcing, sending = answer.over(_plain(receive)), answer.begun(send), answer.part(push)
            try:
                yield (node_id, asking, announcing, get_run, get_fab, pull, sending, confirm)
            except Exception as error:
                log.error("%s", _loss(error))
                raise

    return connection


def _plain(receive: Callable[[], Received | None]) -> Callable[[], Received | None]:
    """Return what receives a message, and drops one whose labels are not plain: Flower logs them as they come."""

    def receive_plain() -> Received | None:
        if (found := receive()) is None:
            return None
        about = found[0].metadata
        labels = (about.message_id, about.group_id, about.message_type)
        if not (odd := [label for label in labels if not _LABEL.fullmatch(label)]):
            return found
        what, limit = "message has a label that is not plain", "128 letters, digits and .:-_"
        value, did = odd[0][:LONGEST_VALUE], "The message was dropped."
        log.error("%s", Fault(number=301, what=what, value=value, limit=limit, did=did))
        return None

    return receive_plain


def _end() -> None:
    what, did = "a part of the answer was announced and never came", "The SuperNode ends here."
    log.error("%s", Fault(number=323, what=what, limit=f"{PART_S:.0f} s", did=did))
    leave(CONNECTION_ENDED)


def _loss(error: Exception) -> Fault:
    """Return what ended the connection: a status that Flower does not ask again after, or an error that it does not."""
    did = "The connection ends here."
    if isinstance(error, httpx.HTTPStatusError):
        what = "the coordinator, or a proxy before it, refused a request"
        return Fault(number=324, what=what, value=f"HTTP {error.response.status_code}", did=did)
    value = f"{type(error).__name__} {error}"[:LONGEST_VALUE]
    return Fault(number=324, what="talk with the coordinator failed", value=value, did=did)

"""What the site adds to Flower's connection to the coordinator, whatever passes through it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from icmoe.errors import Fault

log = logging.getLogger("fl_client")

Connection = tuple[Any, ...]
Connect = Callable[..., Any]

LONGEST_VALUE = 200


def watched(connect: Connect) -> Connect:
    """Return Flower's connection to the coordinator, which says in a sentence of the site's why it was lost.

    Parameters
    ----------
    connect
        Flower's context manager of callbacks. It swallows what ends the connection, and its program then just returns.
    """

    @contextmanager
    def connection(*arguments: Any, **settings: Any) -> Iterator[Connection]:  # noqa: ANN401  (Flower's own signature)
        with connect(*arguments, **settings) as callbacks:
            try:
                yield callbacks
            except Exception as error:
                log.error("%s", _loss(error))
                raise

    return connection


def _loss(error: Exception) -> Fault:
    """Return what ended the connection: a status that Flower does not ask again after, or an error that it does not."""
    did = "The connection ends here."
    if isinstance(error, httpx.HTTPStatusError):
        what = "the coordinator, or a proxy before it, refused a request"
        return Fault(number=324, what=what, value=f"HTTP {error.response.status_code}", did=did)
    value = f"{type(error).__name__} {error}"[:LONGEST_VALUE]
    return Fault(number=324, what="talk with the coordinator failed", value=value, did=did)

"""Replies as they arrive, each by itself: one that cannot be read, is too large or is not all there yet holds up no other.

Flower's own Grid waits for the whole of a reply, and what a site's bytes raise there would end the run for everybody.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from flwr.app import Error, Message, Metadata
from flwr.app.message.message import make_message
from flwr.serverapp import Grid

from fl_server.flower_replies import Gone, HttpGrid, ReplyStore, Unreadable, joined_bytes, read_reply
from fl_server.grid import InFront
from icmoe.errors import Fault, print_faults
from icmoe.messages import ERROR_CODE, error_reason

MOST_OBJECTS = 10_000
"""An update has a handful, one that is not packed some for each tensor."""
SIZE_FACTOR, SPARE_BYTES = 2, 16_000_000
"""A reply may be this times the largest question, which holds the model, and so much more: an update is as large as that."""
LONGEST_S = 7200.0
"""After so long an answer that is not complete is given up, as in Flower."""


class Unusable(Exception):
    """A reply that is not taken: the number of the error, and its value and limit."""

    def __init__(self, number: int, what: str, value: str = "", limit: str = "") -> None:
        super().__init__(what)
        self.number, self.value, self.limit = number, value, limit


@dataclass(slots=True)
class Arrival:
    """A reply that the SuperLink handed out.

    Parameters
    ----------
    metadata
        Who sent it, to what.
    objects
        All that it is made of, by number.
    since
        When it was handed out, on the monotonic clock.
    contents, size_bytes
        As much as was fetched.
    """

    metadata: Metadata
    objects: list[str]
    since: float
    contents: dict[str, bytes] = field(default_factory=dict)
    size_bytes: int = 0


def one_by_one(grid: Grid) -> Grid:
    """Return a Grid that takes replies one by one; one in memory, as in a simulation, has nothing to fetch."""
    return Arriving(grid) if isinstance(grid, HttpGrid) else grid


class Arriving(InFront):
    """Flower's Grid over the network, which hands a bad reply on as an error of its site.

    Parameters
    ----------
    grid
        The Grid that sends and receives.
    """

    def __init__(self, grid: HttpGrid) -> None:
        super().__init__(grid)
        self._store, self._under_way = ReplyStore(grid), dict[str, Arrival]()
        self._largest_bytes = 0

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send the messages; the largest bounds what is taken as an answer."""
        asked = list(messages)
        self._largest_bytes = max([self._largest_bytes, *map(_size_bytes, asked)])
        return self._grid.push_messages(asked)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that are complete; others are looked for again, and nobody waits for them here."""
        asked, now = set(message_ids), time.monotonic()
        if new := asked - self._under_way.keys():  # the SuperLink forgot the others when it handed them out
            arrived = self._store.handed_out(new)
            self._under_way |= {about.reply_to_message_id: Arrival(about, objects, now) for about, objects in arrived}
        replies = list[Message]()
        for number, arrival in list(self._under_way.items()):
            is_old = now - arrival.since > LONGEST_S
            if (reply := self._reply(arrival, is_old=is_old) if number in asked else None) is not None:
                replies.append(reply)
            if reply is not None or is_old:
                del self._under_way[number]
        return replies

    def _reply(self, arrival: Arrival, *, is_old: bool) -> Message | None:
        """Return a reply, an error in its place where it cannot be used, or None where it is not all there yet."""
        try:
            if not self._is_complete(arrival):
                if not is_old:
                    return None
                raise Unusable(304, "answer was not complete in time", limit=f"{LONGEST_S:g} s")
            reply = read_reply(arrival.metadata, arrival.contents)
        except Unusable as found:
            reply = self._refused(arrival.metadata, found)
        except Unreadable as found:
            reply = self._refused(arrival.metadata, Unusable(_number(arrival), "its bytes are no message", str(found)))
        self._store.confirm(arrival.metadata.message_id)
        return reply

    def _is_complete(self, arrival: Arrival) -> bool:
        """Fetch what is there of a reply and return whether that is all."""
        if len(arrival.objects) > MOST_OBJECTS:
            raise Unusable(_number(arrival), "it has too many parts", str(len(arrival.objects)), f"at most {MOST_OBJECTS}")
        try:
            for number in arrival.objects[len(arrival.contents) :]:  # fetched in order, each once
                content = self._store.fetched(number)
                if content is None:
                    return False
                arrival.contents[number] = content
                arrival.size_bytes += len(content)
                self._require_small(arrival, arrival.size_bytes)
        except Gone:
            raise Unusable(304, "the site did not send all of its answer") from None
        self._require_small(arrival, joined_bytes(arrival.contents))
        return True

    def _require_small(self, arrival: Arrival, size_bytes: int) -> None:
        limit = SIZE_FACTOR * self._largest_bytes + SPARE_BYTES
        if size_bytes > limit:
            raise Unusable(_number(arrival), "it is too large", f"{size_bytes} bytes", f"at most {limit}")

    def _refused(self, about: Metadata, found: Unusable) -> Message:
        """Say what is wrong with a reply and return the error that stands in its place."""
        names = {node.node_id: node.name for node in self._grid.get_nodes()}
        where, what = names.get(about.src_node_id) or f"node {about.src_node_id}", f"answer was refused, {found}"
        did = "The others' are used."
        print_faults([Fault(number=found.number, where=where, what=what, value=found.value, limit=found.limit, did=did)])
        return make_message(about, error=Error(ERROR_CODE + found.number, error_reason(found.number)))


def _number(arrival: Arrival) -> int:
    """Return the number for a bad reply: an update's counts as a refused update."""
    return 504 if arrival.metadata.message_type == "train" else 301


def _size_bytes(message: Message) -> int:
    return sum(len(array.data) for record in message.content.array_records.values() for array in record.values())

"""An answer on its way from the ClientApp through the SuperNode, and the end of one whose parts do not come.

A ClientApp that is killed between announcing its answer and handing over the parts leaves Flower's SuperNode waiting for
them, while its heartbeat goes on: the coordinator counts the site as present, and it never answers again.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

PART_S = 240.0
"""Seconds without a part of an announced answer, on this machine; after 180 s Flower takes none any more."""
LOOK_S = 1.0
NEVER = math.inf

P = ParamSpec("P")
R = TypeVar("R")


class Answer:
    """Watches, from the outside, that Flower is not waiting for a part of an answer.

    Between two calls to the coordinator it waits for the site's own ClientApp. During one it waits for the coordinator, for
    as long as that takes.

    Parameters
    ----------
    end
        Called once, in a thread, where a part has not come for `part_s`.
    part_s, look_s
        The limit, and the seconds between two looks.
    """

    def __init__(self, end: Callable[[], None], *, part_s: float, look_s: float = LOOK_S) -> None:
        self.end, self.part_s, self.look_s = end, part_s, look_s
        self.lock, self.calls, self.since_s = threading.Lock(), 0, NEVER
        threading.Thread(target=self._watch, daemon=True).start()

    def begun(self, call: Callable[P, R]) -> Callable[P, R]:
        """Return the call to the coordinator that announces an answer."""

        def announcing(*arguments: P.args, **settings: P.kwargs) -> R:
            with self.lock:
                self.since_s = time.monotonic()
            return self.part(call)(*arguments, **settings)

        return announcing

    def part(self, call: Callable[P, R]) -> Callable[P, R]:
        """Return the call to the coordinator that hands over a part."""

        def sending(*arguments: P.args, **settings: P.kwargs) -> R:
            self._count(1)
            try:
                return call(*arguments, **settings)
            finally:
                self._count(-1)

        return sending

    def over(self, call: Callable[P, R]) -> Callable[P, R]:
        """Return the call to the coordinator that Flower makes only when the answer before it is sent, or given up."""

        def asking(*arguments: P.args, **settings: P.kwargs) -> R:
            with self.lock:
                self.since_s = NEVER
            return call(*arguments, **settings)

        return asking

    def is_stuck(self) -> bool:
        """Return whether a part has been waited for too long."""
        with self.lock:
            return not self.calls and time.monotonic() - self.since_s > self.part_s

    def _count(self, more: int) -> None:
        with self.lock:  # Flower sends several parts at once
            self.calls += more
            if self.since_s < NEVER:  # a part of an answer that was given up may still end later
                self.since_s = time.monotonic()

    def _watch(self) -> None:
        while not self.is_stuck():
            time.sleep(self.look_s)
        self.end()

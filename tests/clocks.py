"""A clock for waits: seconds pass while somebody sleeps, however busy the machine is."""

from __future__ import annotations


class Clock:
    """Stands where the module `time` does."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds

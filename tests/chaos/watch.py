"""What can be seen of a study from outside while it runs: its commits, and which rounds it asked for."""

from __future__ import annotations

import re
import time
from collections import Counter
from dataclasses import dataclass, field

from .scene import Scene

_ASKED = re.compile(r"^round (\d+) of \d+(, attempt \d+ of \d+)?: waiting for (?!\d+ of )")


@dataclass
class Watch:
    """Looks at a study's folder.

    Parameters
    ----------
    scene, name
        Whose.
    round
        Committed.
    committed_s
        When, by the monotonic clock.
    closed
        Whether the closing evaluation is committed.
    asked
        Times that each round was asked for.
    """

    scene: Scene
    name: str
    round: int = 0
    committed_s: float = 0.0
    closed: bool = False
    asked: Counter[int] = field(default_factory=Counter)
    line: str = ""
    stamp: tuple[int, int] = (0, 0)

    def look(self) -> None:
        folder = self.scene.folder(self.name)
        if (line := folder.waiting()) != self.line:
            self.line = line
            if match := _ASKED.match(line):
                self.asked[int(match.group(1))] += 1
        if (stamp := folder.stamp()) != self.stamp:
            self.stamp = stamp
            state = self.scene.progress(self.name)
            if state is not None and (state.round, state.closed) != (self.round, self.closed):
                self.round, self.closed, self.committed_s = state.round, state.closed, time.monotonic()

    @property
    def repeated(self) -> int:
        """Times that a round was asked for again."""
        return sum(count - 1 for count in self.asked.values())

"""Figures that take many seconds, computed aside and once each: the page shows the rest meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field


@dataclass(slots=True)
class Aside:
    """Figures by key.

    Parameters
    ----------
    found
        Those that are there; None is a figure that cannot be had here.
    """

    found: dict[Hashable, float | None] = field(default_factory=dict)
    _begun: set[Hashable] = field(default_factory=set)
    _one_at_a_time: threading.Lock = field(default_factory=threading.Lock)

    def ask(self, key: Hashable, compute: Callable[[], float | None]) -> None:
        """Begin to compute a figure unless that was done already; a process that ends does not wait for it."""
        if key not in self._begun:
            self._begun.add(key)
            threading.Thread(target=self._work, args=(key, compute), daemon=True).start()

    def _work(self, key: Hashable, compute: Callable[[], float | None]) -> None:
        with self._one_at_a_time:
            self.found[key] = compute()

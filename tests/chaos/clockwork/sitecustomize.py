"""Sleep under libfaketime 0.9.10, which leaves waits alone when told to but then refuses Python's own: it waits to an instant."""

from __future__ import annotations

import select
import time


def _sleep(seconds: float) -> None:
    if seconds < 0:
        raise ValueError("sleep length must be non-negative")
    select.select([], [], [], seconds)


time.sleep = _sleep

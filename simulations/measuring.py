"""What work costs a process: the least CPU seconds of several turns, and the most memory that was resident."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Mapping
from pathlib import Path


def least_cpu_s(works: Mapping[str, Callable[[], object]], turns: int) -> dict[str, float]:
    """Return the least process CPU seconds of each work; all are done once in every turn.

    Parameters
    ----------
    works
        By name.
    turns
        At least 1.
    """
    least = dict.fromkeys(works, float("inf"))
    for _ in range(turns):
        for name, work in works.items():
            began = time.process_time()
            work()
            least[name] = min(least[name], time.process_time() - began)
    return least


def peak_bytes() -> int:
    """Return the most memory that was resident in this process at once, pages of files and shared memory counted.

    Not `ru_maxrss` where the kernel tells more: a new process takes that over from the one that started it.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

"""How much memory the machine, or the container, still has."""

from __future__ import annotations

from pathlib import Path


def free_bytes() -> int | None:
    """Return the memory that is free now; None where the system does not say."""
    return min(filter(None, (_available_bytes(), _group_bytes())), default=None)


def _available_bytes() -> int | None:
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _group_bytes() -> int | None:
    """Return what a container's limit leaves, None without one."""
    group = Path("/sys/fs/cgroup")
    limit, used = _lines(group / "memory.max"), _lines(group / "memory.current")
    return int(limit[0]) - int(used[0]) if limit and used and limit[0].isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []

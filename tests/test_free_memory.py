"""How much memory is free: what the machine has, or what a container's limit leaves of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from icmoe import memory


def files(monkeypatch: pytest.MonkeyPatch, **lines: str) -> None:
    """Let the kernel's files, by the last part of their name, hold one line each; others are not there."""
    monkeypatch.setattr(memory, "_lines", lambda path: [lines[path.name]] if path.name in lines else [])


def test_what_is_free_is_some_and_no_more_than_the_machine_has() -> None:
    page = os.sysconf("SC_PAGE_SIZE")
    assert page * os.sysconf("SC_AVPHYS_PAGES") // 2 < memory._available_bytes() <= page * os.sysconf("SC_PHYS_PAGES")
    assert 0 < memory.free_bytes() <= page * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize(
    ("group", "free"),
    [({"memory.max": "9000", "memory.current": "2000"}, 7000), ({"memory.max": "max", "memory.current": "2"}, 10240)],
)
def test_a_containers_limit_counts_where_it_leaves_less(
    group: dict[str, str], free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    files(monkeypatch, meminfo="MemAvailable:   10 kB", **group)
    assert memory.free_bytes() == free


def test_where_the_system_does_not_say_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    files(monkeypatch)
    assert memory.free_bytes() is None
    monkeypatch.undo()
    assert memory._lines(Path("/nowhere/at/all")) == []

"""Folders of work in progress: locked as long as their process lives, so that what a killed one left is told from the rest."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from icmoe.locks import hold

_AS_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


def locked(make: Callable[[], Path]) -> tuple[Path, int]:
    """Return a new folder and the descriptor of its lock, which the process keeps open as long as it works there.

    Parameters
    ----------
    make
        Makes an empty folder; called anew where another process took it for left behind before it was locked.
    """
    while True:
        folder = make()
        with suppress(FileNotFoundError):
            lock = os.open(folder, _AS_FOLDER)
            with suppress(OSError):  # a file system without locks, where no other process takes one either
                hold(lock, name=folder)
            if folder.exists():
                return folder, lock
            os.close(lock)


def remove_left_behind(folders: Iterable[Path]) -> None:
    """Remove those of the folders that are this user's and that no process has locked: theirs was killed."""
    for folder in folders:
        with suppress(OSError):  # another user's, a link, or one that another process removes
            _remove_unlocked(folder)


def _remove_unlocked(folder: Path) -> None:
    lock = os.open(folder, _AS_FOLDER)
    try:
        if os.fstat(lock).st_uid == os.geteuid():
            hold(lock, name=folder, deadline_s=0.0)
            shutil.rmtree(folder)
    finally:
        os.close(lock)

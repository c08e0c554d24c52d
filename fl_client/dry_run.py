"""The folder of a dry run: it holds patients' pictures, and goes when the run ends, or before the next one after a kill."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from icmoe.ending import ENDS, answered, undisturbed
from icmoe.left_behind import locked, remove_left_behind

FORMER = "icmoe-dry-run-"
PREFIX = f"{FORMER}locked-"
FORMER_S = 86400.0
"""Seconds that a dry run of a version without locks is left alone: whether it is running nobody can tell."""


@contextmanager
def passing_folder() -> Iterator[Path]:
    """Give a new folder that is removed at the end, when the command is ended from outside, too.

    Yields
    ------
    Path
        In the folder of temporary files, locked as long as this process lives.
    """
    folder, lock = locked(lambda: Path(tempfile.mkdtemp(prefix=PREFIX)))
    nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    heard = [end for end in ENDS if not (nohup and end == signal.SIGHUP)]
    with answered(heard, _stop):
        try:
            yield folder
        finally:
            with undisturbed():
                shutil.rmtree(folder)
                os.close(lock)


def remove_killed() -> None:
    """Remove the folders of this user's dry runs whose process is gone: one that was killed could not do it itself."""
    folders = Path(tempfile.gettempdir()).glob(f"{FORMER}*")
    remove_left_behind(folder for folder in folders if folder.name.startswith(PREFIX) or _is_old(folder))


def _is_old(folder: Path) -> bool:
    with suppress(OSError):  # it goes meanwhile
        return time.time() - folder.lstat().st_mtime > FORMER_S
    return False


def _stop(number: int, frame: object) -> None:
    del frame
    sys.exit(128 + number)

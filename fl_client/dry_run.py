"""The folder of a dry run: it holds patients' pictures, and goes when the run ends, or before the next one after a kill."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from icmoe.left_behind import locked, remove_left_behind

PREFIX = "icmoe-dry-run-"
_ENDS = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


@contextmanager
def passing_folder() -> Iterator[Path]:
    """Give a new folder that is removed at the end, when the command is ended from outside, too.

    Yields
    ------
    Path
        In the folder of temporary files, locked as long as this process lives.
    """
    folder, lock = locked(lambda: Path(tempfile.mkdtemp(prefix=PREFIX)))
    former = [signal.signal(end, _stop) for end in _ENDS]
    try:
        yield folder
    finally:
        interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one must not stop the removal
        for end in _ENDS:
            signal.signal(end, signal.SIG_IGN)
        shutil.rmtree(folder)
        os.close(lock)
        for end, action in zip((*_ENDS, signal.SIGINT), (*former, interrupt), strict=True):
            signal.signal(end, action)


def remove_killed() -> None:
    """Remove the folders of this user's dry runs whose process is gone: one that was killed could not do it itself."""
    remove_left_behind(Path(tempfile.gettempdir()).glob(f"{PREFIX}*"))


def _stop(number: int, frame: object) -> None:
    del frame
    sys.exit(128 + number)

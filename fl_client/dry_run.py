"""The folder of a dry run: it holds patients' pictures, and goes when the run ends, or before the next one after a kill."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = "icmoe-dry-run-"
_ENDS = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_AS_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


@contextmanager
def passing_folder() -> Iterator[Path]:
    """Give a new folder that is removed at the end, when the command is ended from outside, too.

    Yields
    ------
    Path
        In the folder of temporary files, locked as long as this process lives.
    """
    folder, lock = _made()
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


def remove_left_behind() -> None:
    """Remove the folders of this user's dry runs whose process is gone: one that was killed could not do it itself."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError):  # another user's, or one that another process removes
            _remove_unlocked(folder)


def _remove_unlocked(folder: Path) -> None:
    lock = os.open(folder, _AS_FOLDER)
    try:
        if os.fstat(lock).st_uid == os.geteuid():
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
    finally:
        os.close(lock)


def _made() -> tuple[Path, int]:
    """Return a new folder and its lock; anew where another run took it for left behind before it was locked."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        with suppress(FileNotFoundError):
            lock = os.open(folder, _AS_FOLDER)
            with suppress(OSError):  # a file system without locks, where no other run takes one either
                fcntl.flock(lock, fcntl.LOCK_EX)
            if folder.exists():
                return folder, lock
            os.close(lock)


def _stop(number: int, frame: object) -> None:
    del frame
    sys.exit(128 + number)

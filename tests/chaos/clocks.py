"""A hospital whose clock can be set wrong while it runs, by Debian's libfaketime."""

from __future__ import annotations

import os
from pathlib import Path

from consortium import ROOT

CLOCKWORK = Path(__file__).with_name("clockwork")
LIBRARY = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1")
RIGHT = "+0"


def why_not() -> str:
    return "" if LIBRARY.exists() else "libfaketime is not installed (apt-get install faketime)"


def settings(path: Path) -> dict[str, str]:
    """Environment of a process whose clock is what the file says; waits are not faked."""
    set_clock(path, RIGHT)
    return {
        "LD_PRELOAD": str(LIBRARY),
        "FAKETIME_TIMESTAMP_FILE": str(path),
        "FAKETIME_CACHE_DURATION": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "FAKETIME_DISABLE_SHM": "1",
        "PYTHONPATH": os.pathsep.join([str(CLOCKWORK), str(ROOT)]),
    }


def set_clock(path: Path, shift: str) -> None:
    path.write_text(f"{shift}\n")

"""Which code made a file: the commit of the repository that this package lies in."""

from __future__ import annotations

import subprocess
from pathlib import Path

UNKNOWN = "unknown"


def commit() -> str:
    """Return the commit of the code, with "+" where files differ from it, or "unknown" outside its repository."""
    try:
        _git("ls-files", "--error-unmatch", __file__)  # an installed copy may lie in the repository of somebody else's project
        return _git("describe", "--always", "--abbrev=12", "--dirty=+").strip()
    except (OSError, subprocess.SubprocessError):
        return UNKNOWN


def _git(*words: str) -> str:
    command, here = ["git", *words], Path(__file__).parent
    return subprocess.run(command, cwd=here, capture_output=True, text=True, check=True, timeout=60).stdout

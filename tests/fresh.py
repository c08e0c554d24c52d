"""What a script prints in an interpreter of its own, where nothing is imported yet."""

from __future__ import annotations

import subprocess
import sys


def printed(script: str) -> str:
    """Run a script that must succeed, and return its output without the last line's end."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout.strip()

"""How the supervisor knows which lines are its own processes': they begin with a tag that no other machine can know.

On the same pipe Flower writes what the coordinator sent, and a line of that could else be taken for a fault of the site's.
"""

from __future__ import annotations

import logging
import os
import re
import secrets

VARIABLE = "FL_CLIENT_TAG"
"""Name of the environment variable that hands the tag to the supervisor's children."""
TAG = secrets.token_hex(8)
"""Tag of this process's children, drawn anew at each start."""

_FAULT = re.compile(r"ICM\d{3} .+")


def tag_own_lines() -> None:
    """Let the lines that this process logs as the site's begin with its supervisor's tag; nothing changes without one."""
    if tag := os.environ.get(VARIABLE):
        handler = logging.StreamHandler()
        handler.setLevel(logging.WARNING)
        handler.setFormatter(_Tagged(tag))
        logging.getLogger("fl_client").handlers = [handler]


def untagged(line: str) -> tuple[str, bool]:
    """Return a line of a child without the tag, and whether it is a fault that the site's own code found."""
    text = line.removeprefix(f"{TAG} ")
    return text, text != line and _FAULT.match(text) is not None


class _Tagged(logging.Formatter):
    """Tags the lines of the message, and none of a traceback below it, whose exception may quote anything."""

    def __init__(self, tag: str) -> None:
        super().__init__()
        self.tag = tag

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the message, each line after the tag."""
        return "\n".join(f"{self.tag} {line}" for line in record.message.splitlines())

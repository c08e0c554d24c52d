"""The preflight before each start, in a process of its own: it needs PyTorch, and the supervisor stays small."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

from icmoe.errors import NOT_STARTED, Fault, IcmoeError
from icmoe.processes import program

DEADLINE_S = 300.0
WAITED_FOR = frozenset({311, 312, 313, 314})
"""What may come right by itself or at the coordinator: the supervisor says it and tries again."""


def require_ready(path: Path, name: str, say: Callable[[str], None]) -> None:
    """Say everything that the preflight finds and stop where only somebody at the site can put it right.

    Parameters
    ----------
    path
        The site file.
    name
        The site.
    say
        Takes one sentence per fault.

    Raises
    ------
    IcmoeError
        Every fault that stops the start; 325 where the preflight does not end or says nothing.
    """
    command = [program("fl_client"), "--site", name, "--config", str(path), "check", "--json"]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=DEADLINE_S, check=False)
        checks = json.loads(done.stdout)["checks"]
    except (subprocess.TimeoutExpired, OSError, ValueError, KeyError) as error:
        what, todo = "the preflight did not end", f"Run fl_client --site {name} check."
        fault = Fault(number=325, where=str(path), what=what, value=type(error).__name__, did=NOT_STARTED, todo=todo)
        raise IcmoeError(fault) from None
    faults = [(check["ok"], _fault(check["fault"])) for check in checks if check["fault"]]
    stopping = [fault for ok, fault in faults if not ok and fault.number not in WAITED_FOR]
    if stopping:
        raise IcmoeError(*stopping)
    for _, fault in faults:
        say(str(fault))


def _fault(record: dict[str, str | int]) -> Fault:
    texts = {key: str(record[key]) for key in ("where", "what", "value", "limit", "did", "todo")}
    return Fault(number=int(record["number"]), **texts)

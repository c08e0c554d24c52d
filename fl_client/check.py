"""One line of a preflight: what was looked at, whether it is well, what is wrong, what was found."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from icmoe.errors import Fault, IcmoeError

ResultT = TypeVar("ResultT")


@dataclass(frozen=True, slots=True)
class Check:
    """What one look found.

    Parameters
    ----------
    name
        What was looked at.
    ok
        Whether the site may start.
    fault
        What is wrong; with `ok`, a warning. None with not `ok`: it could not be looked at because of an earlier fault.
    note
        What was found.
    """

    name: str
    ok: bool
    fault: Fault | None = None
    note: str = ""

    def record(self) -> dict[str, Any]:
        """Return the check as plain values for JSON."""
        return {"name": self.name, "ok": self.ok, "note": self.note, "fault": self.fault.record() if self.fault else None}


def attempt(name: str, look: Callable[[], str | Check]) -> list[Check]:
    """Return what `look` found as a passed check, or one failed check per fault that it raised."""
    try:
        found = look()
        return [found if isinstance(found, Check) else Check(name, ok=True, note=found)]
    except IcmoeError as error:
        return [Check(name, ok=False, fault=fault) for fault in error.faults]
    except OSError as error:
        where = str(error.filename or name)
        return [Check(name, ok=False, fault=Fault(number=205, where=where, value=error.strerror or ""))]


def within(deadline_s: float, action: Callable[[], ResultT]) -> ResultT:
    """Return what `action` returns; some waits, such as for a resolver, know no deadline of their own.

    Raises
    ------
    TimeoutError
        Where it takes longer than `deadline_s` seconds; its thread is left behind and ends with the process.
    """
    results: list[ResultT] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(action())
        except BaseException as error:  # noqa: BLE001  (raised again by the caller's thread)
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(deadline_s)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError
    return results[0]

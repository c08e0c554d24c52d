"""What lies beside a study file: the audit log, whom the run waits for, which site a person let in again, whether a run lives."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from fl_server import audit
from fl_server.guard import Memory
from fl_server.run_state import latest_state
from icmoe.atomic import read_regular, write_atomically
from icmoe.errors import Fault, IcmoeError
from icmoe.locks import is_locked
from icmoe.study import read_study

_LIFTED = TypeAdapter(dict[str, int])


def audit_path(study: Path) -> Path:
    """Return the audit log of a study file."""
    return study.with_suffix(".audit.jsonl")


def waiting_path(study: Path) -> Path:
    """Return the file in which a run says whom it waits for."""
    return study.with_suffix(".waiting.txt")


def lock_path(study: Path) -> Path:
    """Return the file that a run of the study holds while it lives."""
    return study.with_suffix(".lock")


def is_held(study: Path) -> bool:
    """Return whether a run of the study lives on this machine; a run that begins at that instant looks again at once."""
    return is_locked(lock_path(study))


def read_lifted(study: Path) -> dict[str, int]:
    """Return, by site, the round after which a person let it in again; empty where nobody did or the file is damaged."""
    try:
        return _LIFTED.validate_json(read_regular(study.with_suffix(".lifted.json")))
    except (OSError, ValidationError):
        return {}


def lift(study: Path, site: str) -> int:
    """Let a site in again from the next round on, as the audit log then says; return the last round done.

    Raises
    ------
    IcmoeError
        518 where the site does not sit out, with the names of those that do; 516 for the audit log. Nothing is changed then.
    """
    state = latest_state(study.with_suffix(".state.safetensors"), read_study(study))
    memory = Memory() if state is None else Memory.unpacked(state.extra)
    if state is None or not memory.sits_out(site):
        out = ", ".join(memory.sitting_out()) or "none"
        raise IcmoeError(Fault(number=518, where=site, limit=f"sits out: {out}", did="Nothing was changed."))
    audit.note(audit_path(study), "lift asked", {"site": site, "round": state.round})
    text = json.dumps({**read_lifted(study), site: state.round}, sort_keys=True)
    write_atomically(study.with_suffix(".lifted.json"), text.encode())
    return state.round

"""Runs, asked of Flower's own command line, whose JSON is public; what it cannot say is in `flower_private`."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fl_server.home import CONNECTION, Home
from icmoe.errors import Fault, IcmoeError
from icmoe.processes import flower_environment, program

ANSWER_S = 60.0


@dataclass(frozen=True, slots=True)
class Run:
    """A run as the SuperLink knows it.

    Parameters
    ----------
    run_id
        Flower's number.
    status
        pending, starting, running, or finished:completed, finished:failed, finished:stopped.
    details
        Flower's reason where it failed.
    fab_sha256
        Of the app as Flower packed it.
    since
        When it was submitted, ISO 8601.
    """

    run_id: str
    status: str
    details: str
    fab_sha256: str
    since: str

    @property
    def finished(self) -> bool:
        """Whether it has ended."""
        return self.status.startswith("finished")


def flwr(home: Home, arguments: Sequence[str]) -> dict[str, Any]:
    """Return what `flwr` answers.

    Raises
    ------
    IcmoeError
        330 where the SuperLink cannot be reached or refuses.
    """
    home.write_flower_configuration()
    command, environment = [program("flwr"), *arguments, "--format", "json"], flower_environment(home.flower, os.environ)
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=ANSWER_S, check=False)
    except subprocess.TimeoutExpired:
        raise IcmoeError(Fault(number=330, where=home.superlink, value=f"no answer in {ANSWER_S:.0f} s")) from None
    answer = _last_object(done.stdout)
    if not answer.get("success"):
        value = str(answer.get("error-message") or done.stderr.strip()[-200:] or f"exit code {done.returncode}")
        raise IcmoeError(Fault(number=330, where=home.superlink, value=" ".join(value.split())))
    return answer


def submit(home: Home, app: Path, study: Path) -> str:
    """Submit the app in folder `app` for the study file and return the number of the run."""
    named = json.dumps(str(study), ensure_ascii=False)  # as TOML writes a text, which knows no half of a letter
    return str(flwr(home, ["run", str(app), CONNECTION, "--run-config", f"study={named}"])["run-id"])


def runs(home: Home) -> list[Run]:
    """Return all runs, the newest first."""
    return [_run(row) for row in flwr(home, ["list", CONNECTION])["runs"]]


def run_of(home: Home, run_id: str) -> Run:
    """Return one run.

    Raises
    ------
    IcmoeError
        508 where the SuperLink does not know it.
    """
    for run in runs(home):
        if run.run_id == run_id:
            return run
    raise IcmoeError(Fault(number=508, value=run_id))


def stop(home: Home, run_id: str) -> None:
    """Stop a run."""
    flwr(home, ["stop", run_id, CONNECTION])


def _run(row: dict[str, Any]) -> Run:
    details = "" if row["status-details"] == "N/A" else row["status-details"]
    return Run(row["run-id"], row["status"], details, row["fab-hash"], row["pending-at"])


def _last_object(text: str) -> dict[str, Any]:
    """Return the JSON object at the end of `text`: Flower may say a word before it."""
    start = text.find("{")
    try:
        found = json.loads(text[start:]) if start >= 0 else {}
    except json.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}

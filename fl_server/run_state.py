"""What is committed after each round, and the last commits, which are kept under their rounds' numbers.

The commits share one file of the settled rounds' records (`fl_server.round_log`), which only grows.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fl_server.round_log import RoundLog
from fl_server.round_strategy import State, Tensors
from icmoe.atomic import regular, write_atomically
from icmoe.errors import Fault, IcmoeError, print_faults
from icmoe.packing import tensors_digest
from icmoe.study import Study

KEPT = 3


@dataclass(slots=True)
class RunState:
    """What is committed after each round.

    Parameters
    ----------
    study_digest
        Of the study that this is the state of.
    arrays
        Global tensors.
    round
        Rounds done.
    history
        One record per round.
    extra
        State of the strategy: server optimiser, guard, privacy.
    closed
        Whether the closing evaluation is in the history.
    """

    study_digest: str
    arrays: Tensors
    round: int = 0
    history: RoundLog = field(default_factory=RoundLog)
    extra: State = field(default_factory=dict)
    closed: bool = False

    def commit(self, path: Path, *, keep: int = 0) -> None:
        """Write the state atomically, and before it what its log has settled.

        Parameters
        ----------
        path
            The newest commit.
        keep
            Last commits to keep under their rounds' numbers, this one among them; older ones are removed.
        """
        tensors: State = {**{f"global.{name}": value for name, value in self.arrays.items()}, **self.extra}
        settled, last = self.history.settle(_log_path(path))
        header = {"study": self.study_digest, "round": self.round, "closed": self.closed}
        header |= {"settled": asdict(settled), "last": last}
        text = json.dumps({**header, "sha256": _digest(header, tensors)})
        write_atomically(path, save(dict(sorted(tensors.items())), metadata={"state": text}))
        if keep:
            _keep(path, self.round, keep)

    @staticmethod
    def load(path: Path, study: Study, *, newest: Path | None = None) -> RunState:
        """Return the committed state.

        Parameters
        ----------
        path
            The commit.
        study
            Whose it must be.
        newest
            Beside which the log of the rounds lies; `path` unless an older commit is read.

        Raises
        ------
        IcmoeError
            502 where the file is damaged or belongs to another study.
        """
        try:
            os.close(regular(path, os.O_RDONLY))  # safetensors waits for the other end of a pipe
            with safe_open(path, framework="numpy") as file:
                header = json.loads(file.metadata()["state"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
            if header.pop("sha256") != _digest(header, tensors):
                raise ValueError("its digest differs")
            digest, done, closed = (header[key] for key in ("study", "round", "closed"))
            history = RoundLog.opened(_log_path(newest or path), header["settled"], header["last"])
        except (SafetensorError, OSError, AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise IcmoeError(_damaged(path, study, str(error))) from None
        if digest != study.digest:
            value, limit = str(digest)[:12], study.digest[:12]
            raise IcmoeError(
                Fault(number=502, where=path.name, what="committed state of another study", value=value, limit=limit)
            )
        arrays = {name.removeprefix("global."): value for name, value in tensors.items() if name.startswith("global.")}
        extra = {name: value for name, value in tensors.items() if not name.startswith("global.")}
        return RunState(digest, arrays, done, history, extra, closed)


def _damaged(path: Path, study: Study, value: str) -> Fault:
    """Return what to do about a commit that cannot be read; what the server spent of a budget is nowhere else."""
    anew = " Once it is removed, training begins anew." if study.privacy.server is None else ""
    todo = f"Restore it from a backup.{anew}"
    return Fault(number=502, where=str(path), what="committed state is damaged", value=value, todo=todo)


def latest_state(path: Path, study: Study) -> RunState | None:
    """Return what `newest_readable` finds and print why it is not the newest; rounds are then repeated.

    Raises
    ------
    IcmoeError
        502 where no commit can be used.
    """
    state, faults = newest_readable(path, study)
    print_faults(faults)
    return state


def newest_readable(path: Path, study: Study) -> tuple[RunState | None, list[Fault]]:
    """Return the newest commit that can be read, None before the first round, and the fault of a newer one that cannot.

    Under [privacy.server] only the newest will do: a repeated round is released a second time, and an older commit would
    not count the first.

    Raises
    ------
    IcmoeError
        502 where no commit can be used.
    """
    if not os.path.lexists(path):  # a link to nothing is a damaged commit, no new study
        return None, []
    try:
        return RunState.load(path, study), []
    except IcmoeError as error:
        for older in reversed(_kept(path)) if study.privacy.server is None else ():
            try:
                state = RunState.load(older, study, newest=path)
            except IcmoeError:
                continue
            did = f"The commit of round {state.round} was used."
            return state, [Fault(number=517, where=path.name, value=error.faults[0].value, did=did)]
        raise


def _keep(path: Path, number: int, keep: int) -> None:
    """Give the newest commit a second name with its round's number, and remove all but the last ones."""
    link, fresh = _numbered(path, number), path.with_name(f".{path.name}.link")
    fresh.unlink(missing_ok=True)
    try:
        os.link(path, fresh)
    except OSError:  # a file system without second names
        shutil.copyfile(path, fresh)
    fresh.replace(link)
    for older in _kept(path)[:-keep]:
        older.unlink(missing_ok=True)


def _log_path(path: Path) -> Path:
    return path.with_suffix(".rounds.jsonl")


def _numbered(path: Path, number: int) -> Path:
    return path.with_suffix(f".{number:05d}{path.suffix}")


def _kept(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{path.stem}.[0-9][0-9][0-9][0-9][0-9]{path.suffix}"))


def _digest(header: Mapping[str, Any], tensors: State) -> str:
    return tensors_digest(tensors, json.dumps(header, sort_keys=True).encode())

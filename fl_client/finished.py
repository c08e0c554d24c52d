"""The finished update of a round, kept until the next rounds: asked for again, a site sends the same bytes for nothing more.

It is known by study, round and incoming global model. It is on the disk before it leaves, so that a process killed between
the two neither trains nor spends again. One that is damaged is trained anew, and spent for anew, and so
is one that was made with a patient who was forgotten since.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save

from fl_client.by_round import FINISHED
from fl_client.manifest import Outgoing
from icmoe.atomic import write_atomically
from icmoe.exchange import State, state_digest
from icmoe.study import Study
from icmoe.tensor_file import read_tensors

log = logging.getLogger("fl_client")

KEPT = 4
"""Updates kept per study: a coordinator that resumes repeats one round; more than that are old."""


def finished_path(state: Path, study: Study, round_number: int, incoming: str) -> Path:
    """Return where a finished update is kept."""
    return state / study.digest[:16] / FINISHED / f"{round_number:05d}-{incoming[:32]}.safetensors"


def finished_or(state: Path, study: Study, round_number: int, incoming: str, train: Callable[[], Outgoing]) -> Outgoing:
    """Return the finished update of a round, or train it and keep it.

    Parameters
    ----------
    state
        The site's state folder.
    study
        The study.
    round_number
        Its round.
    incoming
        Digest of the round's global tensors.
    train
        Spends, trains, and returns what would leave.
    """
    path = finished_path(state, study, round_number, incoming)
    about = {"study": study.digest, "round": str(round_number), "incoming": incoming}
    found = _read(path, about)
    if found is not None:
        log.info("round %d was finished before: the same update is sent again", round_number)
        return found
    outgoing = train()
    tensors = {name: tensor.contiguous() for name, tensor in (outgoing.tensors or {}).items()}
    numbers = json.dumps(dict(outgoing.numbers or {}))
    metadata = {**about, "digest": _digest(tensors, numbers), "numbers": numbers}
    write_atomically(path, save(tensors, metadata=metadata), private=True)
    _prune(path)
    return outgoing


def _read(path: Path, about: dict[str, str]) -> Outgoing | None:
    if not path.exists():
        return None
    try:
        tensors, metadata = read_tensors(path)
        numbers = json.loads(metadata["numbers"])
        same = about.items() <= metadata.items() and metadata["digest"] == _digest(tensors, metadata["numbers"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        log.warning("%s is damaged (%s): the round is trained again", path.name, type(error).__name__)
        return None
    if not same:
        log.warning("%s is not what was kept under this name: the round is trained again", path.name)
    return Outgoing(tensors=tensors, numbers=numbers) if same else None


def _digest(tensors: State, numbers: str) -> str:
    """Return the digest of all that leaves, tensors and numbers."""
    return hashlib.sha256(f"{state_digest(tensors)}\n{numbers}".encode()).hexdigest()


def _prune(last: Path) -> None:
    """Remove all but the newest, the last one among them whatever the clock says."""
    others = sorted(set(last.parent.glob("*.safetensors")) - {last}, key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for path in others[KEPT - 1 :]:
        path.unlink(missing_ok=True)

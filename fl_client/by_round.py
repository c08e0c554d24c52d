"""What a site keeps for itself from round to round: a file for each of its last rounds.

A round starts from what the site's last round before it left, whatever was asked in between: it may have joined late, or been
away. Trained again it therefore starts from the same, and ends with the same bytes.
"""

from __future__ import annotations

import secrets
from pathlib import Path

from icmoe.atomic import read_regular, write_atomically
from icmoe.errors import Fault, IcmoeError
from icmoe.study import Study

KEPT = 4
"""Rounds that are kept: a coordinator whose newest commits are damaged goes back by so many."""

FINISHED, OWED = "finished", "owed"
"""Folder of the finished updates, and beginning of the files of what their rounding left out."""

FORGOT = "forgot"
"""Changes whenever a patient is forgotten whose images were in use."""


def round_path(folder: Path, study: Study, site: str, what: str, round_number: int) -> Path:
    """Return where what a round left is kept.

    Parameters
    ----------
    folder
        The site's state folder.
    study, site, round_number
        Whose it is.
    what
        The beginning of the file's name, such as "owed".
    """
    return folder / study.digest[:16] / site / f"{what}-{round_number:05d}.safetensors"


def last_until(path: Path) -> Path | None:
    """Return the file of the round of `path`, or of the last one before it; None where there is none."""
    return max((one for one in _kept(path) if one.name <= path.name), default=None)


def keep(path: Path, data: bytes, kept: int = KEPT) -> None:
    """Write the file of a round, and remove those of all rounds but the last ones up to it.

    Later ones are of rounds that the coordinator lost and asks for anew.
    """
    write_atomically(path, data, private=True)
    last = [one for one in _kept(path) if one.name <= path.name][-kept:]
    for one in {*_kept(path)} - {*last}:
        one.unlink(missing_ok=True)


def _kept(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{path.name.split('-')[0]}-*.safetensors"))


def forgot(state: Path) -> str:
    """Return what the last `forget_unsent` left, another text each time; empty before the first."""
    try:
        return read_regular(state / FORGOT).hex()
    except FileNotFoundError:
        return ""


def forget_unsent(state: Path) -> None:
    """Remove what the site would still send of finished rounds: kept updates, and what their rounding left out.

    It is noted first: a training that goes on beside it looks after it has written its update, and removes that itself.
    """
    write_atomically(state / FORGOT, secrets.token_bytes(16), private=True)
    _remove_unsent(state)


def require_none_forgotten(state: Path, before: str) -> None:
    """Refuse to send what was trained while a patient was forgotten, and remove it.

    Parameters
    ----------
    state
        The site's state folder.
    before
        What `forgot` returned before the site's data were read.

    Raises
    ------
    IcmoeError
        336 where it returns something else by now; the coordinator is not told more than that.
    """
    if forgot(state) != before:
        _remove_unsent(state)
        raise IcmoeError(Fault(number=336, did="The round's update was not sent."))


def _remove_unsent(state: Path) -> None:
    for path in (*state.glob(f"*/{FINISHED}/*.safetensors"), *state.glob(f"*/*/{OWED}-*.safetensors")):
        path.unlink(missing_ok=True)

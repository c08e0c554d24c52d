"""That a site's patients keep their pseudonyms: its state folder knows which secret they were made with.

With another secret patients change from test to training, and the forgotten ones come back.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from icmoe.atomic import read_regular, write_atomically
from icmoe.data.ingest.pseudonyms import SECRET_FILE, site_pseudonyms
from icmoe.errors import Fault, IcmoeError

FILE = "ingest-secret.json"


class Known(BaseModel):
    """What the state folder says of the secret."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    check: str
    """A hash made with the secret, of nothing."""
    folder: str
    """Where it lay last."""


def require_same_secret(state: Path, folder: Path) -> None:
    """Refuse an ingest folder that has another secret than the site's, or none though the site has one.

    Parameters
    ----------
    state
        The site's state folder.
    folder
        With the secret, as the site file names it now.

    Raises
    ------
    IcmoeError
        129 where the secret is another or is missing, or cannot be read.
    """
    known = _known(state / FILE)
    if known is None:
        return
    found = _check(folder) if (folder / SECRET_FILE).exists() else ""
    if found == known.check:
        return
    anew = (
        f"To begin anew on purpose, remove {state / FILE}: patients may change from test to training then, and forgotten ones "
        "come back."
    )
    if found:
        what, todo = "another secret of the site lies here", "Name the former folder under [ingest] as store."
    elif str(folder.resolve()) == known.folder:
        what, todo = "secret of the site is lost", "Restore it from a backup."
    else:
        what, todo = "the site's secret is not here", f"Move {known.folder} there, or name it under [ingest] as store."
    raise IcmoeError(Fault(number=129, where=str(folder), what=what, did="Nothing was read.", todo=f"{todo} {anew}"))


def note_secret(state: Path, folder: Path) -> None:
    """Note which secret the site has and where; `require_same_secret` came before."""
    known = Known(check=_check(folder), folder=str(folder.resolve()))
    if _known(state / FILE) != known:
        write_atomically(state / FILE, known.model_dump_json().encode(), private=True)


def _check(folder: Path) -> str:
    return site_pseudonyms(folder).of("check", "")


def _known(path: Path) -> Known | None:
    """Return what was noted, None where nothing was; a damaged note is made anew with the next ingest."""
    try:
        return Known.model_validate_json(read_regular(path))
    except (FileNotFoundError, NotADirectoryError, ValidationError):
        return None

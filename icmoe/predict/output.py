"""The output folder of a prediction: written beside its place, moved there whole, never over what somebody else wrote."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from glob import escape
from pathlib import Path

from icmoe.ending import undisturbed
from icmoe.errors import Fault, IcmoeError, file_fault
from icmoe.left_behind import locked, remove_left_behind

RECORD = "prediction.json"


def require_free(out: Path, source: Path, others: Iterable[Path], *, force: bool) -> None:
    """Refuse an output folder that may not be written.

    Parameters
    ----------
    out, source
        Output and input.
    others
        Files that are used.
    force
        Whether a former prediction may be replaced; anything else never is.

    Raises
    ------
    IcmoeError
        141 where something is there, 210 where the output lies in the input, which would be read the next time, or holds
        what is used, which would go with a former prediction.
    """
    inside = Path(os.path.realpath(out))
    if source.is_dir() and Path(os.path.realpath(source)) in [inside, *inside.parents]:
        what = "the output lies inside the input"
        raise IcmoeError(Fault(number=210, where="--output", what=what, value=str(out), did="Nothing was segmented."))
    for used in (source, *others):
        if inside in Path(os.path.realpath(used)).parents:
            what = "what is used lies inside the output"
            raise IcmoeError(Fault(number=210, where="--output", what=what, value=str(used), did="Nothing was segmented."))
    if not out.exists() and not out.is_symlink():
        return
    if out.is_symlink() or not out.is_dir() or (any(out.iterdir()) and not (out / RECORD).is_file()):
        what, todo = "output is there already and is no former prediction", "Name another --output; --force does not replace it."
        raise IcmoeError(Fault(number=141, where=str(out), what=what, did="Nothing was segmented.", todo=todo))
    if any(out.iterdir()) and not force:
        raise IcmoeError(Fault(number=141, where=str(out), did="Nothing was segmented."))


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """Give a new private folder that takes the place of `out` when the block ends well and vanishes otherwise.

    It shows patients: it vanishes too where a signal ends the command, and what a killed one left at the same place goes first.

    Yields
    ------
    Path
        Beside `out`.

    Raises
    ------
    IcmoeError
        205 where it cannot be made or moved there.
    """
    mark = secrets.token_hex(4)
    stage, former = out.parent / f".{out.name}.{mark}.new", out.parent / f".{out.name}.{mark}.old"
    lock = -1
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        remove_left_behind(_beside(out, "new"))
        _, lock = locked(partial(_made, stage))
        yield stage
        if out.exists():
            out.rename(former)
        stage.rename(out)
        remove_left_behind(_beside(out, "old"))
    except OSError as error:
        fault, inside = file_fault(error), str(error.filename or stage).startswith(str(stage))  # a name that nobody gave
        raise IcmoeError(replace(fault, where=str(out) if inside else fault.where, did="Nothing was written.")) from None
    finally:
        with undisturbed():
            if lock >= 0:
                os.close(lock)
            shutil.rmtree(stage, ignore_errors=True)
            _put_back(former, out)


def _put_back(former: Path, out: Path) -> None:
    """Put a former prediction back where no new one took its place; it goes otherwise."""
    if os.path.exists(former) and not os.path.exists(out):  # noqa: PTH110  # also where the name is too long to look
        with suppress(OSError):
            former.rename(out)
    else:
        shutil.rmtree(former, ignore_errors=True)


def _beside(out: Path, kind: str) -> Iterator[Path]:
    """Return the folders that predictions to the same place, living ones and killed ones, have beside it."""
    return out.parent.glob(f".{escape(out.name)}.{'[0-9a-f]' * 8}.{kind}")


def _made(folder: Path) -> Path:
    folder.mkdir(mode=0o700)
    return folder

"""A rehearsal as TensorBoard or MLflow shows it, on request: losses, Dice, bytes and the use of the experts, round by round."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from fl_server.round_log import RoundRecord
from fl_server.round_strategy import unheard
from icmoe.errors import NOT_STARTED, Fault, IcmoeError
from icmoe.kinds import names_of
from simulations.alone import POOLED, by_method
from simulations.federation import Job, Listener, Scored


class Tracker(Protocol):
    """Where the figures of a rehearsal go; each method and seed is a run of its own there."""

    def write(self, job: Job, scalars: Mapping[str, float], number: int) -> None:
        """Write the figures of a round."""

    def close(self, *, finished: bool) -> None:
        """End all runs."""


def _tensorboard(folder: Path) -> Tracker:
    from simulations.to_tensorboard import TensorBoard

    return TensorBoard(folder)


def _mlflow(folder: Path) -> Tracker:
    from simulations.to_mlflow import MLflow

    return MLflow(folder)


DICE = "val Dice"
TRACKERS: dict[str, Callable[[Path], Tracker]] = {"tensorboard": _tensorboard, "mlflow": _mlflow}


@contextmanager
def tracking(tracker: str | None, folder: Path) -> Iterator[tuple[Listener, Scored]]:
    """Write what is told, one run of the tracker's per method and seed, while inside.

    Parameters
    ----------
    tracker
        Key of `TRACKERS`; nothing is written where None.
    folder
        Of the rehearsal; what is written lies below it. A resumed rehearsal adds to it.

    Yields
    ------
    two callables
        To call with each event of the rehearsal, and with each round whose validation scores are in.

    Raises
    ------
    IcmoeError
        213 where the package is not installed.
    """
    if tracker is None:
        yield unheard, unheard
        return
    try:
        to = TRACKERS[tracker](folder)
    except ImportError:
        todo = "Install icmoe-federated[track]."
        raise IcmoeError(Fault(number=213, where=f"--track {tracker}", did=NOT_STARTED, todo=todo)) from None

    def listen(job: Job, record: RoundRecord | None, site: str) -> None:
        del site
        for one, part in _parts(job, record) if record is not None else ():
            to.write(one, scalars_of(one, part), part["round"])

    def scored(job: Job, record: RoundRecord) -> None:
        for one, part in _parts(job, record):
            scalars = scalars_of(one, part)
            to.write(one, {name: value for name, value in scalars.items() if name.startswith(DICE)}, part["round"])

    finished = False
    try:
        yield listen, scored
        finished = True
    finally:
        to.close(finished=finished)


def _parts(job: Job, record: RoundRecord) -> Iterator[tuple[Job, RoundRecord]]:
    """Yield a round by method, as the results have it."""
    for method, part in by_method(job.method, record).items():
        yield replace(job, method=method), part


def run_name(job: Job) -> str:
    """Return the tracker's name of a method and seed."""
    return f"{job.method}-seed{job.study.seed}"


def scalars_of(job: Job, record: RoundRecord) -> dict[str, float]:
    """Return the figures of a round by their names; what a site withheld is left out."""
    names = names_of(job.study.model)
    scalars = {
        "loss/all sites": record["loss"],
        f"{DICE}/all sites": record["val_dice"],
        "usage/spread between sites": record["usage_spread"],
        "bytes/up": record["bytes_up"],
        "bytes/down": record["bytes_down"],
    }
    for name, row in record["sites"].items():
        site = "pooled" if name == POOLED else name  # MLflow takes no brackets
        scalars |= {f"loss/{site}": row["loss"], f"{DICE}/{site}": row["val_dice"]}
        scalars |= {f"usage/{site}/{expert}": share for expert, share in zip(names, row["usage"] or (), strict=False)}
    if spent := record.get("privacy"):
        scalars["privacy/epsilon of the server"] = spent["epsilon"]
    return {name: value for name, value in scalars.items() if value is not None}

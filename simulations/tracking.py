"""A rehearsal as TensorBoard shows it, on request: losses, Dice, bytes and the use of the experts, round by round."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fl_server.round_log import RoundRecord
from fl_server.round_strategy import unheard
from icmoe.errors import Fault, IcmoeError
from icmoe.model import names_of
from simulations.federation import Job, Listener

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FOLDER = "tensorboard"


@contextmanager
def tracking(tracker: str | None, folder: Path) -> Iterator[Listener]:
    """Write what is told, one run of TensorBoard's per method and seed, while inside.

    Parameters
    ----------
    tracker
        "tensorboard"; nothing is written where None.
    folder
        Of the rehearsal; the events go into `tensorboard/METHOD-seedS` below it. A resumed rehearsal adds to them.

    Yields
    ------
    callable
        To call with each event of the rehearsal.

    Raises
    ------
    IcmoeError
        213 where the package is not installed.
    """
    if tracker is None:
        yield unheard
        return
    writers: dict[str, SummaryWriter] = {}
    make = _writer_class()

    def listen(job: Job, record: RoundRecord | None, site: str) -> None:
        del site
        if record is None:
            return
        name = f"{job.method}-seed{job.study.seed}"
        if name not in writers:
            writers[name] = make(str(folder / FOLDER / name))
        write_round(writers[name], job, record)
        writers[name].flush()

    try:
        yield listen
    finally:
        for writer in writers.values():
            writer.close()


def write_round(writer: SummaryWriter, job: Job, record: RoundRecord) -> None:
    """Write one round; what a site withheld is left out."""
    number, names = record["round"], names_of(job.study.model)
    scalars = {
        "loss/all sites": record["loss"],
        "val Dice/all sites": record["val_dice"],
        "usage/spread between sites": record["usage_spread"],
        "bytes/up": record["bytes_up"],
        "bytes/down": record["bytes_down"],
    }
    for site, row in record["sites"].items():
        scalars |= {f"loss/{site}": row["loss"], f"val Dice/{site}": row["val_dice"]}
        scalars |= {f"usage/{site}/{expert}": share for expert, share in zip(names, row["usage"] or (), strict=False)}
    if spent := record.get("privacy"):
        scalars["privacy/epsilon of the server"] = spent["epsilon"]
    for tag, value in scalars.items():
        if value is not None:
            writer.add_scalar(tag, value, number)


def _writer_class() -> type[SummaryWriter]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        todo = "Install icmoe-federated[track]."
        raise IcmoeError(Fault(number=213, where="--track tensorboard", did="Nothing was started.", todo=todo)) from None
    return SummaryWriter

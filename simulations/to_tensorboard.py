"""TensorBoard's events of a rehearsal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from simulations.federation import Job
from simulations.tracking import run_name

FOLDER = "tensorboard"


class TensorBoard:
    """Events in `tensorboard/METHOD-seedS` below the rehearsal's folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / FOLDER
        self._writers: dict[str, SummaryWriter] = {}

    def write(self, job: Job, scalars: Mapping[str, float], number: int) -> None:
        """Write the figures of a round."""
        name = run_name(job)
        if name not in self._writers:
            self._writers[name] = SummaryWriter(str(self._folder / name))
        for tag, value in scalars.items():
            self._writers[name].add_scalar(tag, value, number)
        self._writers[name].flush()

    def close(self, *, finished: bool) -> None:
        """Close the files; events do not say whether a run came to its end."""
        del finished
        for writer in self._writers.values():
            writer.close()

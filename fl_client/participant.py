"""A site as its ClientApp sees it: its own name, its approved studies, its slices, its folders, its device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from icmoe.data.slices import Slice
from icmoe.device import available_device
from icmoe.errors import Fault, IcmoeError
from icmoe.features import FeatureCache
from icmoe.study import Study


@dataclass(frozen=True, slots=True, kw_only=True)
class Participant:
    """Everything a site decides by itself; no message can change it.

    Parameters
    ----------
    name
        Name registered with the site's key.
    studies
        Locally approved studies.
    train, val
        Slices whose features are cached.
    cache_folder
        Feature cache.
    state_folder
        Where personal parts are kept between rounds.
    device
        "cpu", "cuda" or "cuda:N".
    threads
        CPU threads of a training step; part of what makes equal seeds give equal bytes.
    exact_counts
        Whether n_k is sent exactly (simulation only) or rounded up to ten.
    steps_per_round
        Steps of a round where they are not `local_epochs` passes.
    audited
        Whether what comes in is bounded and, like what leaves, written to the audit log (a hospital; not a simulation).
    """

    name: str
    studies: tuple[Study, ...]
    train: tuple[Slice, ...]
    val: tuple[Slice, ...]
    cache_folder: Path
    state_folder: Path
    device: str = "cpu"
    threads: int = 1
    exact_counts: bool = False
    steps_per_round: int | None = None
    audited: bool = False

    def approved(self, digest: object) -> Study:
        """Return the approved study with this digest.

        Raises
        ------
        IcmoeError
            302 where the site approved no such study.
        """
        for study in self.studies:
            if study.digest == digest:
                return study
        raise IcmoeError(Fault(number=302, where=self.name, value=str(digest)[:16], did="Nothing was trained, nothing was sent."))

    def cache(self, study: Study) -> FeatureCache:
        """Return the feature cache of the study's backbone."""
        return FeatureCache.of(self.cache_folder, study)

    def torch_device(self) -> torch.device:
        """Return the device.

        Raises
        ------
        IcmoeError
            211 where it is not there.
        """
        return available_device(self.device)

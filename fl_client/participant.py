"""A site as its ClientApp sees it: its own name, its approved studies, its slices, its folders, its device."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from flwr.app import Context

from fl_client.site import cache_folder_of, read_site_file, site_slices
from icmoe.data.slices import Slice
from icmoe.device import available_device
from icmoe.errors import Fault, IcmoeError
from icmoe.features import FeatureCache
from icmoe.study import Study

ENVIRONMENT = "FL_CLIENT_SITE_FILE"


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
    share_summary
        Whether the coordinator may have the summary of the training images.
    steps_per_round
        Steps of a round where they are not `local_epochs` passes.
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
    share_summary: bool = False
    steps_per_round: int | None = None

    def approved(self, digest: object) -> Study:
        """Return the approved study with this digest.

        Raises
        ------
        IcmoeError
            302 where the site approved no such study.
        """
        for study in self.studies:
            if study.digest == digest:
                if study.labels != self.studies[0].labels:
                    what = "study has other labels than the first approved one, whose masks were read"
                    todo = "Write a site file of its own for this study."
                    raise IcmoeError(Fault(number=302, where=self.name, what=what, value=study.name, todo=todo))
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


def read_site(path: Path) -> Participant:
    """Return the site of a site file, ready to train; its features must be in the cache.

    Raises
    ------
    IcmoeError
        As `read_site_file` and `site_slices`; 207 where features are not there yet.
    """
    settings, studies = read_site_file(path)
    slices = site_slices(path, settings, studies[0])
    cache = FeatureCache.of(cache_folder_of(path, settings), studies[0])
    keys = [cache.key(item.image_digest, "identity") for item in slices]
    if missing := sum(not cache.contains(key) for key in keys):
        todo = f"Run fl_client --site {settings.name} prepare."
        fault = Fault(
            number=207, where=settings.name, what="features are not in the cache", value=f"{missing} of {len(keys)}", todo=todo
        )
        raise IcmoeError(fault)
    return Participant(
        name=settings.name,
        studies=studies,
        train=tuple(item for item in slices if item.split == "train"),
        val=tuple(item for item in slices if item.split == "val"),
        cache_folder=cache.folder,
        state_folder=path.parent / settings.state,
        device=settings.device,
        threads=settings.threads,
        share_summary=settings.share_summary,
    )


def site_from_environment(context: Context) -> Participant:
    """Return the site whose file the environment names; what the coordinator sends has no say in it.

    Raises
    ------
    IcmoeError
        205 where the environment names no file.
    """
    del context
    name = os.environ.get(ENVIRONMENT, "")
    if not name:
        raise IcmoeError(Fault(number=205, where=ENVIRONMENT, what="the environment names no site file"))
    return read_site(Path(name))

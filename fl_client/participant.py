"""A site as its ClientApp sees it: its own name, its approved studies, its slices, its folders, its device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch
from flwr.app import Context

from fl_client.approval import approved_study
from fl_client.budget import Budget
from fl_client.by_round import forgot
from fl_client.policy import Policy, limit_gpu, require_hour
from fl_client.records import Records
from fl_client.signing import Signer
from fl_client.site import cache_folder_of, key_path, read_site_file, site_file_of_environment, site_slices, study_faults
from icmoe.bundle import installed_digest
from icmoe.data.slices import Slice
from icmoe.device import available_device
from icmoe.errors import NOTHING_SENT, Fault, IcmoeError
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
    share_summary
        Whether the coordinator may have the summary of the training images.
    steps_per_round
        Steps of a round where they are not `local_epochs` passes.
    audited
        Whether what comes in is bounded and, like what leaves and what is spent, written down (a hospital). A simulation
        keeps neither ledger nor audit log, with differential privacy either: nothing of it leaves, its report says epsilon.
    key
        Private key that signs the audit log; lines are not signed where absent.
    budget
        What the site may tell about one patient in all.
    policy
        What the site allows, whatever a study says.
    forgot
        What `fl_client forget` had left before the slices were read.
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
    audited: bool = False
    key: Path | None = None
    budget: Budget | None = None
    policy: Policy = field(default_factory=Policy)
    forgot: str = ""

    @property
    def records(self) -> Records | None:
        """The site's ledger and audit log; None in a simulation."""
        signer = Signer(self.key) if self.key is not None else None
        return Records(state=self.state_folder, site=self.name, signer=signer) if self.audited else None

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
        raise IcmoeError(Fault(number=302, where=self.name, value=str(digest)[:16], did=NOTHING_SENT))

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


def read_site(path: Path, digest: str) -> Participant:
    """Return the site of a site file, ready to train one approved study; its features must be in the cache.

    Parameters
    ----------
    path
        The site file.
    digest
        Digest of the study as the message says it; everything else is the site's own.

    Raises
    ------
    IcmoeError
        As `read_site_file`, `approved_study`, `study_faults` and `site_slices`; 320 outside the site's hours, 207 where
        features are not there yet.
    """
    settings = read_site_file(path)
    state_folder = path.parent / settings.state
    before = forgot(state_folder)
    study = approved_study(state_folder, settings.name, digest, installed_digest())
    if faults := study_faults(path, settings, study):
        raise IcmoeError(*faults)
    require_hour(settings.policy, datetime.now(UTC).astimezone())
    slices = site_slices(path, settings, study)
    cache_folder = cache_folder_of(path, settings)
    _require_features(settings.name, FeatureCache.of(cache_folder, study), slices)
    limit_gpu(settings.policy, available_device(settings.device))
    return Participant(
        name=settings.name,
        studies=(study,),
        train=tuple(item for item in slices if item.split == "train"),
        val=tuple(item for item in slices if item.split == "val"),
        cache_folder=cache_folder,
        state_folder=state_folder,
        device=settings.device,
        threads=settings.threads,
        share_summary=settings.share_summary,
        audited=True,
        key=key_path(path, settings),
        budget=settings.budget,
        policy=settings.policy,
        forgot=before,
    )


def site_from_environment(context: Context, digest: str) -> Participant:
    """Return the site whose file the environment names; what the coordinator sends has no say in it.

    Raises
    ------
    IcmoeError
        205 where the environment names no file, else as `read_site`.
    """
    del context  # holds the run's configuration, which the coordinator writes
    return read_site(site_file_of_environment(), digest)


def _require_features(name: str, cache: FeatureCache, slices: Sequence[Slice]) -> None:
    keys = [cache.key(item.image_digest, "identity") for item in slices]
    missing, lost = sum(not cache.contains(key) for key in keys), cache.lacks_rest()
    if missing or lost:
        value, todo = f"{missing} of {len(keys)}", f"Run fl_client --site {name} prepare."
        value += " and the backbone's last stage" if lost else ""
        raise IcmoeError(Fault(number=207, where=name, what="features are not in the cache", value=value, todo=todo))

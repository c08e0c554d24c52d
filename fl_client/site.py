"""A hospital as its site file describes it: its data, and itself ready to train an approved study."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from flwr.app import Context

from fl_client.approval import approved_study
from fl_client.participant import Participant
from fl_client.policy import limit_gpu, require_hour
from fl_client.sitefile import SiteFile, read_site_file, site_file_of_environment, study_faults
from icmoe.bundle import bundle_digest, bundle_files
from icmoe.data.folder import read_folder
from icmoe.data.ingest.index import read_index
from icmoe.data.ingest.run import Export, store_of
from icmoe.data.slices import SiteData, Slice
from icmoe.device import available_device
from icmoe.errors import Fault, IcmoeError
from icmoe.features import FeatureCache, default_cache_folder
from icmoe.study import Study


def site_data(path: Path, settings: SiteFile, study: Study) -> SiteData | None:
    """Return what the site offers for a study, None where its folder does not hold it.

    Raises
    ------
    IcmoeError
        107-110 for a data folder, 129 and 131 for an ingest that has not been run or is damaged.
    """
    if settings.ingest is not None:
        return read_index(store_of(path.parent / settings.ingest.store, study.labels))
    return read_folder(path.parent / str(settings.data), study.labels).get(settings.name)


def site_export(path: Path, settings: SiteFile, study: Study) -> Export:
    """Return what to ingest for a study.

    Raises
    ------
    IcmoeError
        203 where the site file has no section [ingest].
    """
    chosen = settings.ingest
    if chosen is None:
        raise IcmoeError(Fault(number=203, where=str(path), value="[ingest]", did="Nothing was read."))
    folder = path.parent / chosen.store
    return Export(
        site=settings.name,
        root=path.parent / chosen.folder,
        store=store_of(folder, study.labels),
        secret_folder=folder,
        labels=study.labels,
        settings=chosen,
        split_file=path.parent / chosen.split_file if chosen.split_file else None,
    )


def site_slices(path: Path, settings: SiteFile, study: Study) -> tuple[Slice, ...]:
    """Return the site's usable slices.

    Raises
    ------
    IcmoeError
        107-110 for the folder, 108 where this site has no usable training image.
    """
    site = site_data(path, settings, study)
    if site is None or not site.of("train"):
        faults = site.exclusions[:20] if site is not None else ()
        raise IcmoeError(*faults, Fault(number=108, where=settings.name, did="The site cannot take part."))
    return site.slices


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
    study = approved_study(state_folder, settings.name, digest, bundle_digest(bundle_files()))
    if faults := study_faults(path, settings, study):
        raise IcmoeError(*faults)
    require_hour(settings.policy, datetime.now(UTC).astimezone())
    slices = site_slices(path, settings, study)
    cache_folder = path.parent / settings.cache if settings.cache else default_cache_folder()
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
        audited=True,
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
    if missing := sum(not cache.contains(key) for key in keys):
        value, todo = f"{missing} of {len(keys)}", f"Run fl_client --site {name} prepare."
        raise IcmoeError(Fault(number=207, where=name, what="features are not in the cache", value=value, todo=todo))

"""The site file: what one hospital writes about itself, in TOML."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from flwr.app import Context
from pydantic import Field, model_validator

from fl_client.credentials import Coordinator
from fl_client.participant import Participant
from icmoe.config import Section, parse, read_toml
from icmoe.data.folder import read_folder
from icmoe.data.ingest.index import read_index
from icmoe.data.ingest.run import Export, store_of
from icmoe.data.ingest.settings import IngestSettings
from icmoe.data.slices import SiteData, Slice
from icmoe.errors import Fault, IcmoeError
from icmoe.features import FeatureCache, default_cache_folder
from icmoe.study import Study, read_study

ENVIRONMENT = "FL_CLIENT_SITE_FILE"


class SiteFile(Section):
    """Settings of a site; all paths are relative to the file."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,31}$")]
    """Name registered with the site's key."""
    data: str | None = None
    """Folder with <name>/{images,masks} and splits/{train,val,test}.csv; or [ingest]."""
    ingest: IngestSettings | None = None
    """An export of DICOM, NIfTI and PNG files."""
    studies: Annotated[tuple[str, ...], Field(min_length=1)]
    """Study files that this site approves."""
    backbone: str | None = None
    """Weights file of a sam-vit backbone; lite-medsam comes with its package."""
    cache: str | None = None
    """Feature cache; the user's cache folder where absent."""
    state: str = "state"
    """Folder of the parts that never leave the site."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""
    threads: Annotated[int, Field(ge=1, le=256)] = 1
    """CPU threads of a training step."""
    allow_test_only: bool = False
    """Whether studies over the untrained test backbone may run here."""
    coordinator: Coordinator | None = None
    """How to reach the federation; without it the file serves for the data only."""

    @model_validator(mode="after")
    def _one_source(self) -> SiteFile:
        if (self.data is None) == (self.ingest is None):
            raise ValueError("either data or [ingest]")
        return self


def read_site_file(path: Path) -> tuple[SiteFile, tuple[Study, ...]]:
    """Return the settings and the approved studies.

    Raises
    ------
    IcmoeError
        201-205, every fault of the site file at once; 212 per study for tests where the site does not allow them.
    """
    settings = parse(SiteFile, read_toml(path), where=str(path))
    studies = tuple(read_study(path.parent / name) for name in settings.studies)
    tests = [] if settings.allow_test_only else [study for study in studies if study.test_only]
    if tests:
        raise IcmoeError(*(Fault(number=212, where=str(path), value=study.name, did="Nothing was started.") for study in tests))
    return settings, studies


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


def read_site(path: Path) -> Participant:
    """Return the site of a site file, ready to train; its features must be in the cache.

    Raises
    ------
    IcmoeError
        As `read_site_file` and `site_slices`; 207 where features are not there yet.
    """
    settings, studies = read_site_file(path)
    slices = site_slices(path, settings, studies[0])
    cache_folder = path.parent / settings.cache if settings.cache else default_cache_folder()
    cache = FeatureCache.of(cache_folder, studies[0])
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
        cache_folder=cache_folder,
        state_folder=path.parent / settings.state,
        device=settings.device,
        threads=settings.threads,
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

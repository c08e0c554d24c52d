"""The site file: what one hospital writes about itself, in TOML. Nothing here needs PyTorch: the supervisor stays small."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from fl_client.approval import FOLDER
from fl_client.budget import Budget
from fl_client.credentials import Coordinator
from fl_client.policy import Policy, policy_faults
from fl_client.records import Records
from fl_client.signing import Signer
from icmoe.cache_entries import default_cache_folder
from icmoe.config import PathText, Section, parse, read_toml
from icmoe.data.folder import read_folder
from icmoe.data.ingest.index import read_index
from icmoe.data.ingest.run import Export, store_of
from icmoe.data.ingest.settings import IngestSettings
from icmoe.data.slices import SiteData, Slice
from icmoe.errors import NOT_STARTED, Fault, IcmoeError
from icmoe.study import Study

ENVIRONMENT = "FL_CLIENT_SITE_FILE"
NOT_INGESTED = 131


class SiteFile(Section):
    """Settings of a site; all paths are relative to the file."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,31}$")]
    """Name registered with the site's key."""
    data: PathText | None = None
    """Folder with <name>/{images,masks} and splits/{train,val,test}.csv; or [ingest]."""
    ingest: IngestSettings | None = None
    """An export of DICOM, NIfTI and PNG files."""
    cache: PathText | None = None
    """Feature cache; the user's cache folder where absent."""
    state: PathText = "state"
    """Folder of the parts that never leave the site."""
    checkpoint: PathText | None = None
    """Weights file of a backbone that brings none."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""
    threads: Annotated[int, Field(ge=1, le=256)] = 1
    """CPU threads of a training step."""
    share_summary: bool = False
    """Whether the coordinator may have the summary of icmoe/summary.py, to compare sites before the first round. Off
    unless written here: a study is approved for what training sends, and nothing else leaves that nobody allowed. A site
    that declines takes part all the same; `fl_client show --json` shows what would be sent."""
    allow_test_only: bool = False
    """Whether studies over the untrained test backbone may run here."""
    coordinator: Coordinator | None = None
    """How the coordinator is reached; without it the file serves for the data only."""
    policy: Policy = Policy()
    """What the site allows, whatever a study says."""
    budget: Budget | None = None
    """What all studies together may tell about one patient. Absent: no study with differential privacy, since nobody said
    how much may be spent. Present: no study without it, since its epsilon is infinite."""

    @model_validator(mode="after")
    def _one_source(self) -> SiteFile:
        if (self.data is None) == (self.ingest is None):
            raise ValueError("either data or [ingest]")
        return self


def read_site_file(path: Path) -> SiteFile:
    """Return the settings.

    Raises
    ------
    IcmoeError
        201-205, every fault of the site file at once.
    """
    return parse(SiteFile, read_toml(path), where=str(path))


def read_named(path: Path, name: str) -> SiteFile:
    """Return the settings of a site file that must be of site `name`.

    Raises
    ------
    IcmoeError
        As `read_site_file`; 210 where the file is of another site, 205 where its state cannot be looked into.
    """
    settings = read_site_file(path)
    require_name(path, settings, name)
    _require_state(path.parent / settings.state)
    return settings


def require_name(path: Path, settings: SiteFile, name: str) -> None:
    """Refuse a site file that is of another site than the command names, by 210."""
    if settings.name != name:
        what = "--site and the site file differ"
        raise IcmoeError(Fault(number=210, where=str(path), what=what, value=name, limit=settings.name))


def _require_state(state: Path) -> None:
    """Refuse a state folder that cannot be looked into: its approvals and records would pass for none."""
    try:
        for folder in filter(os.path.lexists, (state, state / FOLDER)):
            os.scandir(folder).close()
    except OSError as error:
        todo = "Correct state in the site file, its rights, or restore the folder from a backup."
        what = "state folder cannot be looked into"
        fault = Fault(number=205, where=str(state), what=what, value=error.strerror or "", did="Nothing was done.", todo=todo)
        raise IcmoeError(fault) from None


def study_faults(path: Path, settings: SiteFile, study: Study) -> list[Fault]:
    """Return why the site would not take part in a study: 212 for a test where tests are not allowed, 319 for the policy."""
    tests = [Fault(number=212, where=str(path), value=study.name, did=NOT_STARTED)]
    return (tests if study.test_only and not settings.allow_test_only else []) + policy_faults(settings.policy, study)


def site_file_of_environment() -> Path:
    """Return the site file that the environment names.

    Raises
    ------
    IcmoeError
        205 where it names none.
    """
    name = os.environ.get(ENVIRONMENT, "")
    if not name:
        raise IcmoeError(Fault(number=205, where=ENVIRONMENT, what="the environment names no site file"))
    return Path(name)


def site_data(path: Path, settings: SiteFile, study: Study) -> SiteData | None:
    """Return what the site offers for a study, None where its folder does not hold it.

    Raises
    ------
    IcmoeError
        107-110 for a data folder, 129 and 131 for an ingest that has not been run or is damaged.
    """
    if settings.ingest is not None:
        try:
            return read_index(store_of(path.parent / settings.ingest.store, study.labels))
        except IcmoeError as error:
            todo = run_ingest(settings)
            raise IcmoeError(*(replace(one, todo=todo) if one.number == NOT_INGESTED else one for one in error.faults)) from None
    return read_folder(path.parent / str(settings.data), study.labels).get(settings.name)


def run_ingest(settings: SiteFile) -> str:
    """Return what to do where ingest is owed, in this site's words."""
    return f"Run fl_client --site {settings.name} ingest."


def site_export(path: Path, settings: SiteFile, study: Study) -> Export:
    """Return what to ingest for a study.

    Raises
    ------
    IcmoeError
        203 where the site file has no section [ingest].
    """
    chosen, folder = _ingest_of(path, settings), ingest_folder(path, settings)
    return Export(
        site=settings.name,
        root=path.parent / chosen.folder,
        store=store_of(folder, study.labels),
        secret_folder=folder,
        labels=study.labels,
        settings=chosen,
        split_file=path.parent / chosen.split_file if chosen.split_file else None,
    )


def ingest_folder(path: Path, settings: SiteFile) -> Path:
    """Return where the site's indexes and its secret are.

    Raises
    ------
    IcmoeError
        203 where the site file has no section [ingest].
    """
    return path.parent / _ingest_of(path, settings).store


def _ingest_of(path: Path, settings: SiteFile) -> IngestSettings:
    if settings.ingest is None:
        raise IcmoeError(Fault(number=203, where=str(path), value="[ingest]", did="Nothing was read."))
    return settings.ingest


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


def key_path(path: Path, settings: SiteFile) -> Path | None:
    """Return the site's private key, None where the site file names no coordinator."""
    return path.parent / settings.coordinator.key if settings.coordinator is not None else None


def records_of(path: Path, settings: SiteFile) -> Records:
    """Return the site's ledger and audit log."""
    key = key_path(path, settings)
    return Records(state=path.parent / settings.state, site=settings.name, signer=Signer(key) if key is not None else None)


def cache_folder_of(path: Path, settings: SiteFile) -> Path:
    """Return the folder of the site's cached features."""
    return path.parent / settings.cache if settings.cache else default_cache_folder()

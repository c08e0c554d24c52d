"""What the page shows of a study at one moment, as plain typed values; `GET /state.json` is exactly this."""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import Literal

from pydantic import AwareDatetime

from fl_server.dashboard.references import References
from fl_server.waiting import Wait
from icmoe.config import Section

Phase = Literal["nothing yet", "submitted", "waits for sites", "running", "not running", "stopped", "complete"]
Standing = Literal["answered", "awaited", "overdue", "not connected", "sits out", "not in this run", "took part", "missing"]


class Told(Section):
    """A numbered fault without anything that a site wrote into it."""

    number: int
    """Of the catalogue."""
    title: str
    """What happened."""
    remedy: str
    """What to do."""
    site: str = ""
    """Site or file concerned."""
    value: str = ""
    """The offending value where it is the coordinator's own measurement."""
    limit: str = ""
    """What is allowed."""
    round: int | None = None
    """Round in which it happened."""
    time: AwareDatetime | None = None
    """When it happened, where the audit log says."""


class SiteRow(Section):
    """One site; sequences over rounds have one entry per round of the history, None where the site gave none."""

    name: str
    """As it is registered."""
    standing: Standing
    """Where it stands now."""
    until: AwareDatetime | None = None
    """When the wait for it ends."""
    why: int | None = None
    """Number of the fault for which it was left out of the last round."""
    rounds_used: int = 0
    """Rounds in which its update was used."""
    dice_R: tuple[float | None, ...] = ()
    """Validation Dice of the model that each round left, on this site's own patients."""
    loss_R: tuple[float | None, ...] = ()
    """Mean training loss."""
    usage_M: tuple[float, ...] = ()
    """Share of the experts in its last used update; empty without."""
    bytes_up: int = 0
    """Bytes of its updates, all rounds."""
    bytes_down: int = 0
    """Bytes that it was sent, all rounds."""
    refused: int = 0
    """Refusals in the audit log."""


class RoundRow(Section):
    """One round."""

    round: int
    """Its number, from 1."""
    sites: tuple[str, ...]
    """Whose updates were used."""
    dice: float | None
    """Validation Dice of the model it left, over all sites' patients."""
    loss: float | None
    """Mean training loss."""
    bytes_up: int
    """Bytes of all updates."""
    bytes_down: int
    """Bytes to all sites."""
    seconds: float | None
    """Of waiting, training and aggregation."""
    attempts: int
    """Times that it was asked."""


class Spent(Section):
    """What was spent of one privacy promise."""

    unit: str
    """Whose presence is hidden: a patient of a site, or a site."""
    epsilon: float | None
    """Spent by the rounds so far; None until it is computed, and where it cannot be here."""
    limit: float | None
    """Epsilon of the whole study, where it is set."""
    delta: float
    """Probability with which epsilon may not hold."""
    sentence: str
    """All of it in words."""


class Snapshot(Section):
    """A study at one moment."""

    schema_version: Literal[1] = 1
    """Version of this record."""
    consortium: str
    """Its name."""
    folder: str = ""
    """Folder of the study below the coordinator's runs; empty where there is none yet."""
    others: tuple[str, ...] = ()
    """Folders of all studies, the newest first."""
    study: str = ""
    """Name of the study."""
    digest: str = ""
    """Its digest."""
    run: str = ""
    """Number of its last run."""
    test_only: bool = False
    """Whether its scores say nothing of patients."""
    phase: Phase = "nothing yet"
    """Where it stands."""
    rounds: int = 0
    """Rounds of the study."""
    rounds_done: int = 0
    """Rounds committed."""
    quorum: int = 0
    """Usable updates that a round needs."""
    deadline_s: float = 0.0
    """Seconds that each wait lasts at most."""
    wait: Wait | None = None
    """The wait of a run that lives."""
    ends: AwareDatetime | None = None
    """When the last round will be done at the pace of the last ones; None where that is not known."""
    pace_s: float | None = None
    """Median seconds of the last rounds."""
    experts: tuple[str, ...] = ()
    """Names of the experts."""
    sites: tuple[SiteRow, ...] = ()
    """Every site of the consortium or of the run, by name."""
    history: tuple[RoundRow, ...] = ()
    """Every round."""
    losses_withheld: bool = False
    """Whether privacy at the sites keeps their losses."""
    scores_withheld: bool = False
    """Whether it keeps their validation scores."""
    privacy: tuple[Spent, ...] = ()
    """What was spent."""
    refused: tuple[Told, ...] = ()
    """Refused updates of the audit log, the newest first."""
    faults: tuple[Told, ...] = ()
    """What stopped the last run, and files that cannot be read."""
    references: References | None = None
    """Dice of a rehearsal, for comparison."""
    references_differ: tuple[str, ...] = ()
    """What the rehearsal had otherwise than the study."""

    @cached_property
    def etag(self) -> str:
        """Digest of all of it: what changes when anything does."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:32]

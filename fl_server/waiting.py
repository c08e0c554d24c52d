"""Whom a run waits for and until when, as a small record beside the study for whoever watches the run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AwareDatetime, Field, ValidationError

from icmoe.atomic import regular, write_atomically
from icmoe.config import Section
from icmoe.errors import Fault, IcmoeError

LARGEST_BYTES = 4_000_000  # some 50,000 names; what is larger was not written by a run

Names = tuple[Annotated[str, Field(max_length=256)], ...]
Watch = Callable[["Wait"], object]


class Wait(Section):
    """One wait of a run; written when it begins and with each answer."""

    schema_version: Literal[1] = 1
    """Version of this record."""
    kind: Literal["connection", "answers"]
    """For sites to connect, or for what those that were asked answer."""
    what: Annotated[str, Field(max_length=256)]
    """Part of the run in words, such as "round 2 of 10, attempt 2 of 3"."""
    round: Annotated[int, Field(ge=0, le=10000)]
    """Round that is being played; 0 before the first."""
    since: AwareDatetime
    """When the wait began."""
    until: AwareDatetime
    """When it ends, whoever is missing."""
    sites: Names
    """Who takes part in the run so far."""
    asked: Names = ()
    """Who was asked in this wait."""
    answered: Names = ()
    """Who of them has answered, be it with a refusal."""
    offline: Names = ()
    """Who takes part and was not connected when the others were asked."""

    def with_answer(self, site: str) -> Wait:
        """Return the wait after one more answer."""
        return self.model_copy(update={"answered": tuple(sorted({*self.answered, site}))})

    @property
    def awaited(self) -> tuple[str, ...]:
        """Who was asked and has not answered."""
        return tuple(sorted(set(self.asked) - set(self.answered)))


def begun(
    kind: Literal["connection", "answers"],
    what: str,
    number: int,
    deadline_s: float,
    sites: Iterable[str],
    *,
    asked: Sequence[str] = (),
    offline: Iterable[str] = (),
) -> Wait:
    """Return a wait that begins now.

    Parameters
    ----------
    kind, what, number, sites, asked, offline
        As in `Wait`; `number` is its round.
    deadline_s
        Seconds until it ends.
    """
    now = datetime.now(UTC)
    return Wait(
        kind=kind,
        what=what,
        round=number,
        since=now,
        until=now + timedelta(seconds=deadline_s),
        sites=tuple(sorted(sites)),
        asked=tuple(asked),
        offline=tuple(sorted(offline)),
    )


def wait_path(study: Path) -> Path:
    """Return the file of a study's newest wait."""
    return study.with_suffix(".waiting.json")


def write_wait(study: Path, wait: Wait) -> None:
    """Leave the wait beside the study; the next one replaces it, hence no waiting for the disk, which may be full."""
    with suppress(OSError):
        write_atomically(wait_path(study), wait.model_dump_json().encode(), durable=False)


def read_wait(study: Path) -> Wait | None:
    """Return the newest wait, None before the first.

    Raises
    ------
    IcmoeError
        523 where the record is damaged.
    """
    path = wait_path(study)
    try:
        with open(path, "rb", opener=regular) as file:
            return Wait.model_validate_json(file.read(LARGEST_BYTES))
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        value = f"{error.strerror}" if isinstance(error, OSError) else f"{error.error_count()} faults"
        did = "Whom the run waits for is not known here; the run is not touched by it."
        raise IcmoeError(Fault(number=523, where=path.name, value=value, did=did)) from None

"""The studies that a hospital approved: whole copies, so that changing a study's file later changes nothing.

One JSON file per study in the folder `approvals` of the site's state folder, readable by its owner alone, named by the
study's digest. A withdrawn approval stays as a record.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationError

from icmoe.atomic import prepared, read_regular
from icmoe.chain import Entry
from icmoe.config import Section, flat
from icmoe.errors import NOT_STARTED, NOTHING_SENT, Fault, IcmoeError
from icmoe.locks import LOCK_S, claim, held_for
from icmoe.study import Study, canonical, canonical_json

FOLDER = "approvals"


def _time(text: str) -> str:
    if datetime.fromisoformat(text).tzinfo is None:
        raise ValueError("a time with its offset")
    return text


Time = Annotated[str, AfterValidator(_time)]


class Approval(Section):
    """One approval."""

    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Digest of the study when it was approved. A later version of the study's schema may give it another one."""
    study: Study
    """The approved study, whole."""
    bundle: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """`icmoe.bundle.installed_digest` when the study was approved."""
    approved_at: Time
    """Time, ISO 8601 with offset."""
    withdrawn_at: Time | None = None
    """When the approval was withdrawn; it stands where absent."""


def read_approvals(state: Path) -> tuple[Approval, ...]:
    """Return all approvals of a state folder, withdrawn ones too, the oldest first.

    Raises
    ------
    IcmoeError
        321 for every file that is damaged, was changed, or was written by a version whose studies cannot be read any more.
    """
    faults: list[Fault] = []
    found: list[Approval] = []
    for path in sorted((state / FOLDER).glob("*.json")):
        try:
            content = read_regular(path)
            found.append(Approval.model_validate_json(content))
            digest = _digest(json.loads(content)["study"])
        except (OSError, ValidationError) as error:
            faults.append(Fault(number=321, where=str(path), value=type(error).__name__, did=NOT_STARTED))
            continue
        if not digest == path.stem == found[-1].digest:
            faults.append(Fault(number=321, where=str(path), value=digest[:12], limit=path.stem[:12], did=NOT_STARTED))
    if faults:
        raise IcmoeError(*faults)
    return tuple(sorted(found, key=lambda approval: (datetime.fromisoformat(approval.approved_at), approval.digest)))


@contextmanager
def one_at_a_time(state: Path) -> Iterator[None]:
    """Hold the store: of an approval and a withdrawal at once, list and log would end differently.

    Parameters
    ----------
    state
        The site's state folder; where there is none, there is nothing to hold.

    Yields
    ------
    None

    Raises
    ------
    IcmoeError
        325 where another process holds it for longer than `icmoe.locks.LOCK_S`.
    """
    what, todo, did = "another approval or withdrawal is at work here", "End it, and run this again.", "Nothing was changed."
    busy = Fault(number=325, where=str(state), what=what, value=held_for(LOCK_S), did=did, todo=todo)
    held = -1
    try:
        with suppress(OSError):  # no folder, or a file system without locks
            held = os.open(state, os.O_RDONLY | os.O_DIRECTORY)
            claim(held, busy, deadline_s=LOCK_S)
        yield
    finally:
        if held >= 0:
            os.close(held)


def approve(state: Path, study: Study, bundle: str, now: datetime) -> None:
    """Keep the study as approved, together with the digest of the package that may run it."""
    with approving(state, study, bundle, now):
        pass


@contextmanager
def approving(state: Path, study: Study, bundle: str, now: datetime) -> Iterator[None]:
    """Write an approval, which stands when the block has ended well: what is said of it there is true, however full the disk.

    Parameters
    ----------
    state
        The site's state folder.
    study
        What is approved.
    bundle
        `icmoe.bundle.installed_digest` of the package that may run it.
    now
        The time.

    Yields
    ------
    None
    """
    when = now.isoformat(timespec="microseconds")
    with _kept(state, Approval(digest=study.digest, study=study, bundle=bundle, approved_at=when)):
        yield


def withdraw(state: Path, which: str, now: datetime) -> tuple[Approval, ...]:
    """Withdraw the standing approvals of a study's name, or of a digest or its beginning, and return them.

    One that cannot be kept as withdrawn, for want of room on the disk, is removed: a site can always leave.

    Raises
    ------
    IcmoeError
        316 where none stands.
    """
    when = now.isoformat(timespec="microseconds")
    gone = tuple(one.model_copy(update={"withdrawn_at": when}) for one in named(state, which))
    for approval in gone:
        try:
            with _kept(state, approval):
                pass
        except OSError:
            _file_of(state, approval).unlink()
    return gone


def named(state: Path, which: str) -> tuple[Approval, ...]:
    """Return the standing approvals of a study's name, or of a digest or its beginning of 8 digits or more, the oldest first.

    Raises
    ------
    IcmoeError
        316 where none stands, 321 where the store is damaged.
    """
    found = tuple(one for one in standing(read_approvals(state)) if is_named(one, which))
    if not found:
        todo = "fl_client --site NAME approvals lists them."
        raise IcmoeError(Fault(number=316, what="no such study is approved", value=which, todo=todo))
    return found


def is_named(approval: Approval, which: str) -> bool:
    """Return whether `which` is the study's name, or its digest or the beginning of it."""
    return approval.study.name == which or (len(which) >= 8 and approval.digest.startswith(which))


def withdrawal(approval: Approval) -> dict[str, str | None]:
    """Return what the audit log says of a withdrawal; its line may be of a later time."""
    return {"study": approval.digest, "name": approval.study.name, "withdrawn_at": approval.withdrawn_at}


def unrecorded(approvals: Sequence[Approval], lines: Sequence[Entry]) -> tuple[Approval, ...]:
    """Return the withdrawn approvals of whose withdrawal the audit log does not speak."""
    last = {line["study"]: line["event"] for line in lines if line["event"] in {"approved", "withdrawn"}}
    return tuple(one for one in approvals if one.withdrawn_at and last.get(one.digest) != "withdrawn")


def standing(approvals: Sequence[Approval]) -> tuple[Approval, ...]:
    """Return the approvals that were not withdrawn."""
    return tuple(approval for approval in approvals if approval.withdrawn_at is None)


def approved_studies(state: Path) -> tuple[Study, ...]:
    """Return the studies whose approval stands, the latest first.

    Raises
    ------
    IcmoeError
        316 where there is none, 321 where the store is damaged.
    """
    studies = tuple(approval.study for approval in reversed(standing(read_approvals(state))))
    if not studies:
        raise IcmoeError(Fault(number=316, did=NOT_STARTED))
    return studies


def approved_study(state: Path, site: str, digest: str, bundle: str) -> Study:
    """Return the study that a message names, from the site's own copy.

    Parameters
    ----------
    state
        The site's state folder.
    site
        Its name.
    digest
        Digest of the study as the message says it.
    bundle
        `icmoe.bundle.installed_digest` of the package that is installed now.

    Raises
    ------
    IcmoeError
        302 where no approval of it stands, 318 where the package changed since, 321 where the store is damaged.
    """
    did = NOTHING_SENT
    approval = next((one for one in standing(read_approvals(state)) if one.digest == digest), None)
    if approval is None:
        raise IcmoeError(Fault(number=302, where=site, value=digest[:16], did=did))
    if approval.bundle != bundle:
        raise IcmoeError(Fault(number=318, where=site, value=bundle[:16], limit=approval.bundle[:16], did=did))
    return approval.study


def changes(old: Study, new: Study) -> list[tuple[str, str, str]]:
    """Return (setting, old value, new value) for every setting that differs, sorted by setting."""
    before, after = (_settings(study) for study in (old, new))
    differing = sorted(key for key in {*before, *after} if before.get(key) != after.get(key))
    return [(key, before.get(key, "-"), after.get(key, "-")) for key in differing]


def _digest(values: dict[str, Any]) -> str:
    """Return the digest of a study as it was written, by whatever version."""
    return hashlib.sha256(canonical_json(values).encode()).hexdigest()


def _settings(study: Study) -> dict[str, str]:
    return {key: json.dumps(value) for key, value in flat(study.model_dump(mode="json"))}


def _file_of(state: Path, approval: Approval) -> Path:
    return state / FOLDER / f"{approval.digest}.json"


def _kept(state: Path, approval: Approval) -> AbstractContextManager[None]:
    values = {**approval.model_dump(mode="json"), "study": json.loads(canonical(approval.study))}  # what the digest is of
    return prepared(_file_of(state, approval), json.dumps(values, indent=1).encode(), private=True)

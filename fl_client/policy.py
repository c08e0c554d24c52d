"""What a hospital allows, whatever a study says: checked when a study is approved and again at each message."""

from __future__ import annotations

import re
from datetime import datetime, time
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, field_validator

from icmoe.accounting import study_epsilon
from icmoe.config import Section
from icmoe.errors import Fault, IcmoeError
from icmoe.study import Study

if TYPE_CHECKING:
    import torch

_HOURS = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)")
_REFUSED = "The site does not take part."


class Policy(Section):
    """Section [policy] of the site file; the defaults allow every study that the site approves."""

    min_quorum: Annotated[int, Field(ge=1, le=10000)] = 1
    """Smallest quorum that a study must declare. It is the coordinator's word: no site can check it."""
    require_dp: bool = False
    """Whether only studies with differential privacy at the site may run."""
    max_epsilon: Annotated[float, Field(gt=0.0, le=1000.0)] | None = None
    """Largest epsilon of a study, as planned and as spent; a study without differential privacy is above every limit."""
    labels: tuple[str, ...] = ()
    """Labels that a study may name besides its background; all where empty."""
    hours: str | None = None
    """Hours of the day, local time, such as "19:00-06:30"; outside them the site refuses and the round goes on."""
    gpu_share: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Largest share of the GPU's memory that training may take."""

    largest_update_norm: Annotated[float, Field(gt=0.0, le=1e9)] | None = None
    """Largest norm of an update; the study's bound, 1000 steps of its learning rate, holds where absent or smaller."""
    mantissa_bits: Annotated[int, Field(ge=4, le=23)] = 23
    """Bits of mantissa that leave of each number of an update; 23 is float32 as it is, int8 has at most 6."""

    @field_validator("hours")
    @classmethod
    def _hours_can_be_read(cls, hours: str | None) -> str | None:
        if hours is not None:
            match = _HOURS.fullmatch(hours)
            if match is None or match.group(1, 2) == match.group(3, 4):
                raise ValueError("HH:MM-HH:MM, two different times of the day")
        return hours


def policy_faults(policy: Policy, study: Study) -> list[Fault]:
    """Return where the study breaks the policy; empty where it does not."""
    faults = []
    if study.quorum < policy.min_quorum:
        faults.append(_fault(study, "quorum is below the site's", str(study.quorum), f"at least {policy.min_quorum}"))
    if policy.require_dp and study.privacy.site is None:
        faults.append(_fault(study, "study has no differential privacy", "none", "require_dp"))
    if policy.max_epsilon is not None and (epsilon := study_epsilon(study)) > policy.max_epsilon:
        faults.append(_fault(study, "epsilon is above the site's", f"{epsilon:.3g}", f"at most {policy.max_epsilon:g}"))
    foreign = [label.name for label in study.labels[1:] if policy.labels and label.name not in policy.labels]
    if foreign:
        faults.append(_fault(study, "label is not allowed", ", ".join(foreign), ", ".join(policy.labels)))
    return faults


def require_hour(policy: Policy, now: datetime) -> None:
    """Refuse outside the site's hours; the first minute belongs to them, the last does not.

    Raises
    ------
    IcmoeError
        320 outside the hours.
    """
    if policy.hours is None:
        return
    opens, closes = (time.fromisoformat(part) for part in policy.hours.split("-"))
    clock = now.time()
    inside = opens <= clock < closes if opens < closes else clock >= opens or clock < closes
    if not inside:
        raise IcmoeError(Fault(number=320, value=f"{clock:%H:%M}", limit=policy.hours, did=_REFUSED))


def limit_gpu(policy: Policy, device: torch.device) -> None:
    """Let this process take no more than the site's share of the GPU's memory."""
    import torch  # only where something is trained; the supervisor reads the policy too

    if device.type == "cuda" and policy.gpu_share < 1.0:
        torch.cuda.set_per_process_memory_fraction(policy.gpu_share, device)


def _fault(study: Study, what: str, value: str, limit: str) -> Fault:
    return Fault(
        number=319, where=study.name, what=f"study breaks the site's policy: {what}", value=value, limit=limit, did=_REFUSED
    )

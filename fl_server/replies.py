"""Replies of the sites, parsed into complete updates or refused by number."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, Message, MetricRecord

from icmoe.errors import CATALOGUE, Fault
from icmoe.exchange import LOSS_KEY, NUMBERS, SECONDS_KEY, SLICES_KEY, STEPS_KEY, UPDATE, USAGE_KEY, is_personal
from icmoe.study import Study
from icmoe.study_privacy import SitePrivacy

SIMPLEX_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """A site's contribution to a round, checked.

    Parameters
    ----------
    site
        Name registered with the node.
    size
        n_k >= 1.
    usage_M
        On the simplex; empty without experts.
    loss
        Mean training loss; None where privacy at the site withholds it.
    steps
        Training steps.
    train_s
        Seconds of training; None where privacy at the site withholds them.
    size_bytes
        Bytes of the tensors as sent.
    tensors
        Deltas by name, float32.
    """

    site: str
    size: int
    usage_M: tuple[float, ...]
    loss: float | None
    steps: int
    train_s: float | None
    size_bytes: int
    tensors: Mapping[str, npt.NDArray[np.float32]]

    def without_tensors(self) -> Update:
        """Return the numbers alone, for the record."""
        return replace(self, tensors={})


def mean_loss(updates: Sequence[Update]) -> float | None:
    """Return the mean training loss, each site by its size; None where a site withholds it."""
    losses = [update.loss for update in updates if update.loss is not None]
    if len(losses) < len(updates) or not updates:
        return None
    size_S = np.array([update.size for update in updates], dtype=np.float64)
    return float(size_S @ np.array(losses) / size_S.sum())


class Refusal(Exception):
    """A reply that cannot be used; its text is the reason."""


def parse_replies(
    replies: Iterable[Message],
    sites: Mapping[int, str],
    study: Study,
    current: Mapping[str, npt.NDArray[np.float32]],
) -> tuple[list[Update], list[Fault]]:
    """Return the usable updates in site-name order and one fault per reply that is none.

    Parameters
    ----------
    replies
        As received, in any order.
    sites
        Names by node; a reply from another node is refused.
    study
        Decides which tensors are expected.
    current
        The round's global tensors.
    """
    updates: dict[str, Update] = {}
    faults: list[Fault] = []
    for reply in replies:
        site = sites.get(reply.metadata.src_node_id, "")
        if reply.has_error():
            faults.append(site_fault(site, reply.error.reason))
            continue
        try:
            if not site or site in updates:
                raise Refusal("a reply from a node that was not asked" if not site else "a second reply in one round")
            updates[site] = _parse(reply, site, study, current)
        except Refusal as refusal:
            faults.append(Fault(number=504, where=site, what="update was refused", value=str(refusal)))
    return [updates[site] for site in sorted(updates)], faults


def site_fault(site: str, reason: str | None) -> Fault:
    """Return the fault that a site reported; the round went on without it."""
    return Fault(number=reported_number(reason), where=site, did="The round went on without the site.")


def reported_number(reason: str | None) -> int:
    """Return the number that a site reported as "ICMnnn sentence", else 304; its text is not repeated, it may name files."""
    text = reason or ""
    number = int(text[3:6]) if re.match(r"ICM[0-9]{3}", text) else 304
    return number if number in CATALOGUE else 304


def _parse(reply: Message, site: str, study: Study, current: Mapping[str, npt.NDArray[np.float32]]) -> Update:
    content = reply.content
    if set(content) != {UPDATE, NUMBERS}:
        raise Refusal(f"records {sorted(content)} instead of {UPDATE} and {NUMBERS}")
    arrays, numbers = content[UPDATE], content[NUMBERS]
    if not isinstance(arrays, ArrayRecord) or not isinstance(numbers, MetricRecord):
        raise Refusal("records of another type")
    privacy = study.privacy.site
    if privacy is not None:
        _require_private(numbers, privacy)
    return Update(
        site=site,
        size=_whole(numbers, SLICES_KEY),
        usage_M=_usage(numbers, study.model.experts),
        loss=_number(numbers, LOSS_KEY) if privacy is None else None,
        steps=_whole(numbers, STEPS_KEY),
        train_s=_number(numbers, SECONDS_KEY) if privacy is None else None,
        size_bytes=sum(len(array.data) for array in arrays.values()),
        tensors=_tensors(arrays, study, current),
    )


def _require_private(numbers: MetricRecord, privacy: SitePrivacy) -> None:
    """Refuse what a site under privacy would not have sent: it did not follow the study."""
    if withheld := sorted({LOSS_KEY, SECONDS_KEY} & set(numbers)):
        raise Refusal(f"{', '.join(withheld)}: withheld in a private study")
    if numbers.get(SLICES_KEY) != privacy.patients:
        raise Refusal(f"{SLICES_KEY} = {numbers.get(SLICES_KEY)!r}, not the study's public {privacy.patients}")


def _tensors(
    arrays: ArrayRecord, study: Study, current: Mapping[str, npt.NDArray[np.float32]]
) -> dict[str, npt.NDArray[np.float32]]:
    personal = study.aggregation.personal
    expected = {
        name for name in current if not name.endswith("balance_bias_M") and not (personal and is_personal(name, study.model))
    }
    if set(arrays) != expected:
        raise Refusal(f"tensors differ from the study's: {sorted(set(arrays) ^ expected)[:3]}")
    tensors = {}
    for name in sorted(expected):
        tensor = arrays[name].numpy()
        if tensor.dtype != np.float32 or tensor.shape != current[name].shape:
            raise Refusal(f"{name} is {tensor.dtype} {tensor.shape}, not float32 {current[name].shape}")
        if not np.isfinite(tensor).all():
            raise Refusal(f"{name} holds NaN or infinity")
        tensors[name] = tensor
    return tensors


def _number(numbers: MetricRecord, key: str) -> float:
    value = numbers.get(key)
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise Refusal(f"{key} = {value!r}, not a finite number")
    return float(value)


def _whole(numbers: MetricRecord, key: str) -> int:
    value = numbers.get(key)
    if not isinstance(value, int) or value < 1:
        raise Refusal(f"{key} = {value!r}, not a whole number above 0")
    return value


def _usage(numbers: MetricRecord, experts: int) -> tuple[float, ...]:
    value = numbers.get(USAGE_KEY)
    if not isinstance(value, list) or len(value) != experts:
        raise Refusal(f"usage is not a list of {experts} numbers")
    on_simplex = all(math.isfinite(u) and u >= 0.0 for u in value) and abs(sum(value) - 1.0) <= SIMPLEX_TOLERANCE
    if experts and not on_simplex:
        raise Refusal("usage is not on the simplex")
    return tuple(float(u) for u in value)

"""Replies of the sites, parsed into complete updates or refused by number."""

from __future__ import annotations

import math
import re
from collections.abc import ItemsView, Iterable, Iterator, Mapping, Sequence, ValuesView
from dataclasses import dataclass, replace
from functools import lru_cache
from operator import attrgetter
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, Message, MetricRecord

from icmoe.errors import CATALOGUE, Fault
from icmoe.kinds import BALANCE_BIAS, is_personal
from icmoe.messages import (
    LARGEST_LOSS,
    LONGEST_S,
    LOSS_KEY,
    MOST_IMAGES,
    MOST_STEPS,
    NUMBERS,
    SECONDS_KEY,
    SIMPLEX_TOLERANCE,
    SLICES_KEY,
    STEPS_KEY,
    UPDATE,
    USAGE_KEY,
)
from icmoe.packing import PACKED, is_plain, plain_view, tensors_in
from icmoe.quantise import EXPONENT, HIGHEST_EXPONENT, LARGEST, LOWEST_EXPONENT, Dequantised, out_of_range, sent_shapes
from icmoe.study import ModelShape, Study
from icmoe.study_privacy import SitePrivacy

PIECE = 65_536
"""Values of a tensor that are worked on at a time: a piece of the sum, of an update and of their product stay in the cache."""

Form = Literal["float32", "int8"]
FLOAT32 = np.dtype(np.float32)
DATA = attrgetter("data")


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
        Deltas by name, float32; those of a reply are read anew each time (`InReply`), and those in int8 made then.
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

    def loaded(self) -> Update:
        """Return it with its tensors in memory, for who looks at them by name or more than once."""
        return replace(self, tensors=dict(self.tensors.items()))


class InReply(Mapping[str, npt.NDArray[np.float32]]):
    """The checked tensors of a reply, read from its bytes each time that they are gone through: nothing is held meanwhile.

    A thousand updates would otherwise be in memory twice. Go through `items` or `values`, which read once; a single name
    costs as much as all of them (`Update.loaded`).

    Parameters
    ----------
    arrays
        Record of the reply.
    shapes
        Of its tensors by name, sorted.
    form
        In which they were sent.
    is_plain
        Whether every tensor is plain, as `icmoe.packing.is_plain` says: it is not parsed again then.
    """

    def __init__(self, arrays: ArrayRecord, shapes: Mapping[str, tuple[int, ...]], form: Form, *, is_plain: bool = False) -> None:
        self._arrays, self._shapes, self._form, self._is_plain = arrays, shapes, form, is_plain

    def __len__(self) -> int:
        return len(self._shapes)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __getitem__(self, name: str) -> npt.NDArray[np.float32]:
        return self._read()[name]

    def items(self) -> ItemsView[str, npt.NDArray[np.float32]]:
        """Return names and tensors, read once."""
        return self._read().items()

    def values(self) -> ValuesView[npt.NDArray[np.float32]]:
        """Return the tensors, read once."""
        return self._read().values()

    @property
    def is_view(self) -> bool:
        """Whether reading copies nothing: the record holds every tensor by itself, as it is."""
        return self._form == "float32" and set(self._arrays) != {PACKED}

    def _read(self) -> Mapping[str, npt.NDArray[np.float32]]:
        if self._is_plain:
            items = dict(self._arrays.items())  # Flower's record looks names up more slowly
            return {name: plain_view(items[name], FLOAT32, shape) for name, shape in self._shapes.items()}
        sent: Mapping[str, Any] = tensors_in(self._arrays)  # checked before
        return Dequantised(sent) if self._form == "int8" else sent


def mean_loss(updates: Sequence[Update]) -> float | None:
    """Return the mean training loss, each site by its size; None where a site withholds it."""
    losses = [update.loss for update in updates if update.loss is not None]
    if len(losses) < len(updates) or not updates:
        return None
    size_S = np.array([update.size for update in updates], dtype=np.float64)
    return float(size_S @ np.array(losses) / size_S.sum())


class Refusal(Exception):
    """A reply that cannot be used: the reason, the value and what is allowed."""

    def __init__(self, reason: str, value: str = "", limit: str = "") -> None:
        super().__init__(reason)
        self.value, self.limit = value, limit

    def fault(self, site: str) -> Fault:
        """Return the refusal as a fault of a site."""
        did = "The round went on without it."
        return Fault(number=504, where=site, what=f"update was refused, {self}", value=self.value, limit=self.limit, did=did)


def parse_replies(
    replies: Iterable[Message],
    sites: Mapping[int, str],
    study: Study,
    current: Mapping[str, npt.NDArray[np.float32]],
    form: Form | None = None,
    *,
    values: bool = True,
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
    form
        Of the updates; the study's where None.
    values
        False where the caller finds out itself whether all values are finite.
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
                raise Refusal("it is from a node that was not asked" if not site else "it is the second of one round")
            updates[site] = parse_update(reply, site, study, current, form, values=values)
        except Refusal as refusal:
            faults.append(refusal.fault(site))
    return [updates[site] for site in sorted(updates)], faults


def site_fault(site: str, reason: str | None) -> Fault:
    """Return the fault that a site reported; the round went on without it."""
    return Fault(number=reported_number(reason), where=site, did="The round went on without the site.")


def reported_number(reason: str | None) -> int:
    """Return the number that a site reported as "ICMnnn sentence", else 304; its text is not repeated, it may name files."""
    text = reason or ""
    number = int(text[3:6]) if re.match(r"ICM[0-9]{3}", text) else 304
    return number if number in CATALOGUE else 304


def parse_update(
    reply: Message,
    site: str,
    study: Study,
    current: Mapping[str, npt.NDArray[np.float32]],
    form: Form | None = None,
    *,
    values: bool = True,
) -> Update:
    """Return the update of a reply that is no error; parameters as for `parse_replies`.

    Raises
    ------
    Refusal
        Where anything in it is not as the study says.
    """
    content = reply.content
    if set(content) != {UPDATE, NUMBERS}:
        raise Refusal("it holds other records", f"{sorted(content)}"[:80], f"{UPDATE} and {NUMBERS}")
    arrays, numbers = content[UPDATE], content[NUMBERS]
    if not isinstance(arrays, ArrayRecord) or not isinstance(numbers, MetricRecord):
        raise Refusal("its records have another type", f"{type(arrays).__name__} and {type(numbers).__name__}")
    privacy = study.privacy.site
    if privacy is not None:
        _require_private(numbers, privacy)
    update = Update(
        site=site,
        size=_whole(numbers, SLICES_KEY, MOST_IMAGES),
        usage_M=_usage(numbers, study.model.experts),
        loss=_number(numbers, LOSS_KEY, -LARGEST_LOSS, LARGEST_LOSS) if privacy is None else None,
        steps=_whole(numbers, STEPS_KEY, MOST_STEPS),
        train_s=_number(numbers, SECONDS_KEY, 0.0, LONGEST_S) if privacy is None else None,
        size_bytes=sum(map(len, map(DATA, arrays.values()))),
        tensors=checked_tensors(arrays, study, current, form or study.update.form),
    )
    if values:
        require_finite(update)
    return update


def require_finite(update: Update) -> None:
    """Refuse an update that holds NaN or infinity.

    Raises
    ------
    Refusal
        With the name of the first such tensor.
    """
    for name, tensor in update.tensors.items():
        if not is_finite(tensor):
            value = f"{np.count_nonzero(~np.isfinite(tensor))} of {tensor.size} values"
            raise Refusal(f"{name} holds NaN or infinity", value, "finite")


def only_finite(updates: Iterable[Update]) -> tuple[list[Update], list[Fault]]:
    """Return the updates without NaN and infinity, and a fault for each of the others."""
    found, faults = list[Update](), list[Fault]()
    for update in updates:
        try:
            require_finite(update)
            found.append(update)
        except Refusal as refusal:
            faults.append(refusal.fault(update.site))
    return found, faults


def _require_private(numbers: MetricRecord, privacy: SitePrivacy) -> None:
    """Refuse what a site under privacy would not have sent: it did not follow the study."""
    if withheld := sorted({LOSS_KEY, SECONDS_KEY} & set(numbers)):
        raise Refusal("it tells what a private study withholds", ", ".join(withheld), "nothing of it")
    if numbers.get(SLICES_KEY) != privacy.patients:
        raise Refusal("its size is not the study's public one", repr(numbers.get(SLICES_KEY))[:40], str(privacy.patients))


def checked_tensors(arrays: ArrayRecord, study: Study, current: Mapping[str, npt.NDArray[np.float32]], form: Form) -> InReply:
    """Return an update's tensors, their names sorted; their values are not looked at.

    Raises
    ------
    Refusal
        Where one is missing, too many, or of another shape or type.
    """
    own = study.model if study.aggregation.personal else None
    shapes = _shapes(tuple((name, tensor.shape) for name, tensor in current.items()), own)
    expected = sent_shapes(shapes) if form == "int8" else shapes
    named = set(arrays) == set(expected)
    if named and form == "float32" and all(is_plain(item, FLOAT32, shapes[name]) for name, item in arrays.items()):
        return InReply(arrays, shapes, form, is_plain=True)  # by their bytes alone: making arrays of them takes twice as long
    found = tensors_in(arrays) if named or set(arrays) == {PACKED} else dict.fromkeys(arrays)
    if set(found) != set(expected):
        missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
        value = f"{len(missing)} missing, {len(extra)} extra, such as {(missing + extra)[0][:60]}"
        raise Refusal("its tensors are not the study's", value, f"{len(expected)} tensors")
    for name, tensor in found.items():
        if tensor is None:
            raise Refusal(f"{name} is no array", f"{len(arrays[name].data)} bytes", f"{form} {expected[name]}")
        _require_form(name, tensor, expected[name], form)
    return InReply(arrays, shapes, form)


@lru_cache(maxsize=8)
def _shapes(current: tuple[tuple[str, tuple[int, ...]], ...], personal: ModelShape | None) -> Mapping[str, tuple[int, ...]]:
    """Return the shapes of an update by sorted name, one object for all updates of a round.

    Parameters
    ----------
    current
        Of the round's tensors.
    personal
        The model, where parts of it stay at the sites.
    """
    sent = (name for name, _ in current if name != BALANCE_BIAS)
    shapes = dict(current)
    return {name: shapes[name] for name in sorted(sent) if personal is None or not is_personal(name, personal)}


def _require_form(name: str, tensor: npt.NDArray[Any], shape: tuple[int, ...], form: Form) -> None:
    if tensor.dtype != np.dtype(form) or tensor.shape != shape:
        raise Refusal(f"{name} has another type or shape", f"{tensor.dtype} {tensor.shape}", f"{form} {shape}")
    if form == "int8" and (wrong := out_of_range(name, tensor)):
        limit = f"{LOWEST_EXPONENT} to {HIGHEST_EXPONENT}" if name.endswith(EXPONENT) else f"{-LARGEST} to {LARGEST}"
        raise Refusal(f"{name} holds what no update in int8 does", f"{wrong} of {tensor.size} values", limit)


def is_finite(tensor: npt.NDArray[np.float32]) -> bool:
    """Return whether all values are finite; a finite sum of squares says so at a fifth of the cost of looking at each."""
    values_N = tensor.reshape(-1)
    return math.isfinite(np.vdot(values_N, values_N)) or bool(np.isfinite(values_N).all())


def _number(numbers: MetricRecord, key: str, low: float, high: float) -> float:
    value = numbers.get(key)
    if not isinstance(value, int | float) or not low <= value <= high:
        raise Refusal(f"{key} is no number in its range", repr(value)[:40], f"{low:g} to {high:g}")
    return float(value)


def _whole(numbers: MetricRecord, key: str, most: int) -> int:
    value = numbers.get(key)
    if not isinstance(value, int) or not 1 <= value <= most:
        raise Refusal(f"{key} is no whole number in its range", repr(value)[:40], f"1 to {most}")
    return value


def _usage(numbers: MetricRecord, experts: int) -> tuple[float, ...]:
    value = numbers.get(USAGE_KEY)
    if not isinstance(value, list) or len(value) != experts:
        raise Refusal("usage is no list of a number per expert", repr(value)[:40], f"{experts} numbers")
    on_simplex = all(math.isfinite(u) and u >= 0.0 for u in value) and abs(sum(value) - 1.0) <= SIMPLEX_TOLERANCE
    if experts and not on_simplex:
        found = f"sum {sum(value):.4g}, least {min(value):.4g}"
        raise Refusal("usage is not on the simplex", found, "sum 1, none below 0")
    return tuple(float(u) for u in value)

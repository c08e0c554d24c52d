"""What may leave a site, declared from its approved study: names, shapes, types and ranges of each kind of answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from fl_client.incoming import STEPS
from icmoe.errors import IcmoeError
from icmoe.exchange import global_state, update_of
from icmoe.messages import (
    DICE_KEY,
    LARGEST_LOSS,
    LONGEST_S,
    LOSS_KEY,
    MOST_IMAGES,
    MOST_STEPS,
    PATIENTS_KEY,
    SECONDS_KEY,
    SIMPLEX_TOLERANCE,
    SITE_KEY,
    SLICES_KEY,
    STEPS_KEY,
    SUMMARY_KEY,
    USAGE_KEY,
)
from icmoe.model import build_model
from icmoe.quantise import Dequantised, out_of_range, sent_shapes
from icmoe.study import Study
from icmoe.summary import parse_summary

_TYPES = {"float32": torch.float32, "int8": torch.int8}

Number = int | float | list[int] | list[float]
Numbers = dict[str, Number]


@dataclass(frozen=True, slots=True)
class Rule:
    """What one number, list of numbers or text must be.

    Parameters
    ----------
    allowed
        In words, for the site's log.
    holds
        Whether a value is that.
    """

    allowed: str
    holds: Callable[[object], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outgoing:
    """What a site would answer.

    Parameters
    ----------
    tensors
        Update by name; None where the answer has none.
    numbers
        Numbers by key; None likewise.
    texts
        Name, announced size or summary by key; None likewise.
    """

    tensors: Mapping[str, Tensor] | None = None
    numbers: Mapping[str, Number] | None = None
    texts: Mapping[str, str | int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What one kind of answer holds: exactly these names, no more and no fewer.

    Parameters
    ----------
    shapes
        Shape of each tensor as it leaves; None where the answer has no tensors.
    form
        Type of all of them, as the study calls it.
    numbers, texts
        Rules; None where the answer has none.
    largest_norm
        Of all tensors together, as the coordinator will read them.
    """

    shapes: Mapping[str, tuple[int, ...]] | None = None
    form: Literal["float32", "int8"] = "float32"
    numbers: Mapping[str, Rule] | None = None
    texts: Mapping[str, Rule] | None = None
    largest_norm: float = math.inf

    def faults(self, outgoing: Outgoing) -> Iterator[str]:
        """Yield what of an answer is not declared, in words that hold no value of it that could tell of a patient."""
        yield from self._of_tensors(outgoing.tensors)
        yield from _of_values(self.numbers, outgoing.numbers)
        yield from _of_values(self.texts, outgoing.texts)

    def _of_tensors(self, tensors: Mapping[str, Tensor] | None) -> Iterator[str]:
        yield from _other_names(self.shapes, tensors)
        norms: dict[str, float] = {}
        for name, shape in sorted((self.shapes or {}).items()):
            if name not in (tensors or {}):
                continue
            tensor = (tensors or {})[name]
            if not isinstance(tensor, Tensor) or tensor.dtype != _TYPES[self.form] or tuple(tensor.shape) != shape:
                yield f"{name} is not {self.form} of shape {shape}"
            elif self.form == "int8" and out_of_range(name, tensor.numpy()):
                yield f"{name} holds values outside their range"
            elif not math.isfinite(norm := _norm(tensor)):
                yield f"{name} holds NaN or infinity"
            else:
                norms[name] = norm
        if tensors is None or len(norms) < len(self.shapes or {}):
            return
        if self.form == "int8":
            read = Dequantised({name: tensors[name].numpy() for name in norms})
            norms = {name: _norm(torch.from_numpy(value)) for name, value in read.items()}
        if math.hypot(*norms.values()) > self.largest_norm:
            yield f"norm of the update is above {self.largest_norm:.4g}"


def manifest_of(study: Study, site: str, kind: str, *, exact: bool = False, largest_norm: float | None = None) -> Manifest:
    """Return what an answer may hold, besides how far the site's records have come, which `release` adds itself.

    Parameters
    ----------
    study
        The approved study.
    site
        The site's name.
    kind
        "site", "summary", "train" or "evaluate".
    exact
        Whether n_k is told exactly (simulation only).
    largest_norm
        The site's bound on the norm of an update, where it has one; it can only lower the study's.
    """
    if kind == "site":
        own = Rule("the site's own name", lambda value: value == site)
        return Manifest(texts={SITE_KEY: own, SLICES_KEY: _size(study, exact=exact)})
    if kind == "summary":
        return Manifest(texts={SUMMARY_KEY: _summary(study)})
    if kind == "evaluate":
        return Manifest(numbers=_scores(study))
    shapes, form = update_shapes(study), study.update.form
    farthest = STEPS * study.training.learning_rate * math.sqrt(sum(map(math.prod, shapes.values())))
    return Manifest(
        shapes=sent_shapes(shapes) if form == "int8" else shapes,
        form=form,
        numbers={**_scores(study), **_training(study, exact=exact)},
        largest_norm=min(farthest, largest_norm or math.inf),
    )


@lru_cache(maxsize=8)
def update_shapes(study: Study) -> Mapping[str, tuple[int, ...]]:
    """Return the shape of every tensor of an update, in whatever form it leaves; a process builds the model once for it."""
    model = build_model(study, seed=0)
    update = update_of(model, global_state(model), personal=study.aggregation.personal, shape=study.model)
    return MappingProxyType({name: tuple(tensor.shape) for name, tensor in update.items()})


def _norm(tensor: Tensor) -> float:
    """Return the norm of a tensor, finite where all values are: their squares do not overflow in float64; 0 of integers."""
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) if tensor.is_floating_point() else 0.0


def _scores(study: Study) -> dict[str, Rule]:
    """Return the rules of validation scores; under privacy they may be withheld."""
    privacy = study.privacy.site
    if privacy is not None and privacy.scores == "withheld":
        return {}
    return {DICE_KEY: _between(0.0, 1.0), PATIENTS_KEY: _whole(0, MOST_IMAGES)}


def _training(study: Study, *, exact: bool) -> dict[str, Rule]:
    """Return the rules of a round's numbers; under privacy loss and seconds stay at the site, the rest are constants."""
    experts, privacy = study.model.experts, study.privacy.site
    usage = Rule(f"{experts} shares that add up to 1", lambda value: _on_simplex(value, experts))
    rules = {SLICES_KEY: _size(study, exact=exact), USAGE_KEY: usage}
    if privacy is not None:
        return {**rules, STEPS_KEY: _whole(privacy.steps, privacy.steps)}
    loss, seconds = _between(-LARGEST_LOSS, LARGEST_LOSS), _between(0.0, LONGEST_S)
    return {**rules, STEPS_KEY: _whole(1, MOST_STEPS), LOSS_KEY: loss, SECONDS_KEY: seconds}


def _between(low: float, high: float) -> Rule:
    return Rule(f"a number from {low:g} to {high:g}", lambda value: type(value) in {int, float} and low <= value <= high)  # type: ignore[operator]


def _whole(low: int, high: int, step: int = 1) -> Rule:
    words = f"a whole number from {low} to {high}" + (f", a multiple of {step}" if step > 1 else "")
    return Rule(words, lambda value: type(value) is int and low <= value <= high and value % step == 0)


def _size(study: Study, *, exact: bool) -> Rule:
    if study.privacy.site is not None:
        return _whole(study.privacy.site.patients, study.privacy.site.patients)
    return _whole(1, MOST_IMAGES) if exact else _whole(10, MOST_IMAGES, 10)


def _on_simplex(value: object, length: int) -> bool:
    if not isinstance(value, list) or len(value) != length or any(type(share) is not float for share in value):
        return False
    return not length or (all(0.0 <= share <= 1.0 for share in value) and abs(sum(value) - 1.0) <= SIMPLEX_TOLERANCE)


def _summary(study: Study) -> Rule:
    def holds(value: object) -> bool:
        try:
            parse_summary(value, study.classes, where="")
        except IcmoeError:
            return False
        return True

    return Rule("a summary in its one form", holds)


def _other_names(declared: Mapping[str, object] | None, found: Mapping[str, object] | None) -> Iterator[str]:
    if (declared is None) != (found is None):
        yield "parts that are not declared" if declared is None else "a declared part is missing"
    for name in sorted(set(declared or {}) - set(found or {})):
        yield f"{name} is missing"
    if extra := len(set(found or {}) - set(declared or {})):
        yield f"{extra} names that are not declared"


def _of_values(rules: Mapping[str, Rule] | None, values: Mapping[str, object] | None) -> Iterator[str]:
    yield from _other_names(rules, values)
    for name, rule in sorted((rules or {}).items()):
        if name in (values or {}) and not rule.holds((values or {})[name]):
            yield f"{name} is not {rule.allowed}"

"""The kinds of experts, and to which expert or part of the model a tensor belongs by its name; needs no PyTorch."""

from __future__ import annotations

import re
from dataclasses import dataclass

from icmoe.study import ModelShape

BALANCE_BIAS = "balance_bias_M"
_EXPERT = re.compile(r"experts\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of expert; `ModelShape` has its number under `<name>_experts`, `icmoe.experts.BODIES` what makes one.

    Parameters
    ----------
    name
        As in the experts' names, "semantic-2".
    usage_weighted
        Whether the router's usage weighs its tensors at the server; plain FedAvg does otherwise.
    personal
        Whether personal mode keeps it at the site.
    """

    name: str
    usage_weighted: bool
    personal: bool


KINDS = (
    Kind("basic", usage_weighted=False, personal=False),
    Kind("semantic", usage_weighted=True, personal=False),
    Kind("adaptive", usage_weighted=True, personal=True),
)
"""All kinds, in the order in which a model holds them."""


def kinds_of(shape: ModelShape) -> list[Kind]:
    """Return the kind of each expert of the model, in its order."""
    return [kind for kind in KINDS for _ in range(getattr(shape, f"{kind.name}_experts"))]


def names_of(shape: ModelShape) -> tuple[str, ...]:
    """Return the names of the experts that `shape` asks for, in the model's order."""
    counts = [(kind.name, getattr(shape, f"{kind.name}_experts")) for kind in KINDS]
    return tuple(f"{name}-{number + 1}" for name, count in counts for number in range(count))


def expert_of(name: str) -> int | None:
    """Return the index of the expert that a tensor belongs to, None for shared tensors and the router."""
    match = _EXPERT.match(name)
    return int(match.group(1)) if match else None


def kind_of(name: str, shape: ModelShape) -> Kind | None:
    """Return the kind of the expert that a tensor belongs to, None where it belongs to none of the model's."""
    expert, kinds = expert_of(name), kinds_of(shape)
    return kinds[expert] if expert is not None and expert < len(kinds) else None


def is_usage_weighted(name: str, shape: ModelShape) -> bool:
    """Return whether the router's usage weighs this tensor: those of semantic and adaptive experts."""
    kind = kind_of(name, shape)
    return kind is not None and kind.usage_weighted


def weighing_expert(name: str, shape: ModelShape) -> int | None:
    """Return the expert whose use weighs this tensor, None where size alone does."""
    return expert_of(name) if is_usage_weighted(name, shape) else None


def is_personal(name: str, shape: ModelShape) -> bool:
    """Return whether personal mode keeps this tensor at the site: adaptive experts and router."""
    kind = kind_of(name, shape)
    return name.startswith("router.") or (kind is not None and kind.personal)

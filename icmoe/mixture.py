"""Several models as one: the weighted mean of their class probabilities. A site's own model is such a mixture.

B images, K classes, h x w the grid of the logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from icmoe.exchange import State
from icmoe.features import Features
from icmoe.model import ICMoE, model_of
from icmoe.study import Study

SEPARATOR = "|"
SUM_TOLERANCE = 1e-6
"""By how much weights may miss a sum of 1."""


class MixedOutput(NamedTuple):
    """What a mixture says of a batch."""

    logits_BKhw: Tensor
    """Logarithm of the mean class probabilities."""
    experts: None = None
    """Each member has experts of its own; their maps are not mixed."""


class Mixture(nn.Module):
    """Models of one study side by side.

    Parameters
    ----------
    members
        By name, at least one.
    weights
        Of every member, positive, summing to 1.
    """

    def __init__(self, members: Mapping[str, ICMoE], weights: Mapping[str, float]) -> None:
        super().__init__()
        one = min(weights.values(), default=0.0) > 0.0 and abs(sum(weights.values()) - 1.0) <= SUM_TOLERANCE
        if not members or set(members) != set(weights) or not one:
            raise ValueError(f"weights {dict(weights)} for members {sorted(members)}: positive ones that sum to 1 expected")
        self.names = tuple(sorted(members))
        self.members = nn.ModuleList(members[name] for name in self.names)
        self.log_weight_P = [torch.tensor(weights[name]).log().item() for name in self.names]

    @property
    def expert_names(self) -> tuple[str, ...]:
        """None: see `MixedOutput.experts`."""
        return ()

    def forward(self, features: Features) -> MixedOutput:
        """Return the logarithm of sum_p w_p softmax(logits_p)."""
        log_p_PBKhw = torch.stack(
            [
                member(features).logits_BKhw.float().log_softmax(dim=1) + log_weight
                for member, log_weight in zip(self.members, self.log_weight_P, strict=True)
            ]
        )
        return MixedOutput(log_p_PBKhw.logsumexp(dim=0))


def mixture_of(study: Study, states: Mapping[str, State], weights: Mapping[str, float]) -> Mixture:
    """Return the mixture of the members that have a weight, in evaluation mode on the CPU.

    Raises
    ------
    IcmoeError
        301 where the tensors of a member are not the study's.
    """
    return Mixture({name: model_of(study, states.get(name, {})) for name in weights}, weights).eval()


def joined(states: Mapping[str, State]) -> State:
    """Return the tensors of all members in one table, named "member|tensor"."""
    return {f"{member}{SEPARATOR}{name}": tensor for member, state in states.items() for name, tensor in state.items()}


def parted(state: Mapping[str, Tensor]) -> dict[str, State]:
    """Return what `joined` put together; a name without a member counts for the member ""."""
    found: dict[str, State] = {}
    for whole, tensor in state.items():
        member, _, name = whole.rpartition(SEPARATOR)
        found.setdefault(member, {})[name] = tensor
    return found

"""The common form of all rivals: what is left of an encoder, then a decoder; cross-entropy and Dice as the only losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from icmoe.exchange import State, state_digest
from icmoe.features import Features
from icmoe.losses import counted_as_background, cross_entropy, dice_loss
from icmoe.study import LossWeights, ModelShape


class Logits(NamedTuple):
    """Class logits B K h w, with the fields that training and evaluation ask of an output."""

    logits_BKhw: Tensor
    experts: None = None


class Segmenter(nn.Module):
    """A rival, with what `icmoe.training.train_round` and `icmoe.evaluation` ask of a model.

    Parameters
    ----------
    tail
        From cached features, or an image kept in their place, to `Features`.
    decoder
        From `Features` to class logits, B K h w.
    """

    shape = ModelShape(basic_experts=0, semantic_experts=0, adaptive_experts=0)

    def __init__(self, tail: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.tail, self.decoder = tail, decoder

    def start_round(self) -> None:
        """Do nothing: no rival keeps anything from round to round."""

    def forward(self, features: Features, generator: torch.Generator | None = None) -> Logits:
        """Return the class logits; no rival draws random numbers."""
        del generator
        return Logits(self.decoder(self.tail(features)))

    def losses(
        self,
        features: Features,
        target_BKhw: Tensor,
        weights: LossWeights,
        generator: torch.Generator,
        anchor_router: None = None,
        unknown: Sequence[int] = (),
    ) -> tuple[dict[str, Tensor], Logits]:
        """Return cross-entropy and Dice, each B, and the output; `weights` are applied by the caller, `unknown` as in IC-MoE."""
        del weights, generator, anchor_router
        output = self(features)
        log_p_BKhw = counted_as_background(output.logits_BKhw.float().log_softmax(dim=1), unknown, dim=1)
        return {
            "cross_entropy": cross_entropy(log_p_BKhw, target_BKhw),
            "dice": dice_loss(log_p_BKhw.exp(), target_BKhw),
        }, output


def trained_state(model: nn.Module) -> State:
    """Return a copy of the tensors that are trained, and so sent, by sorted name."""
    return {name: tensor.detach().clone() for name, tensor in sorted(model.named_parameters()) if tensor.requires_grad}


def trained_count(model: nn.Module) -> int:
    """Return the number of trained parameters."""
    return sum(tensor.numel() for tensor in model.parameters() if tensor.requires_grad)


def frozen_digest(model: nn.Module) -> str:
    """Return the SHA-256 of everything in the model that is not trained, buffers included."""
    trained = {name for name, tensor in model.named_parameters() if tensor.requires_grad}
    return state_digest({name: tensor for name, tensor in model.state_dict().items() if name not in trained})


def put_trained(model: nn.Module, state: State) -> None:
    """Copy trained tensors into the model; names must be exactly those of `trained_state`."""
    own = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    if own.keys() != state.keys():
        raise ValueError(f"other tensors are trained: {sorted(own.keys() ^ state.keys())}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name])

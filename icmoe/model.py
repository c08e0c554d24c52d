"""The trained part of IC-MoE around a frozen backbone.

    x = E + sum_l sigmoid(a_l) Conv1x1_l(F_l) ;  xn = GroupNorm(x)
    D_e = up_e(body_e(xn)) ;  v_e = softmax_K(Vote(x + D_e)) ;  g = voting(Router(xn), v)
    y = x + sum_e g_e D_e ;  logits = Head(y) ;  z = normalise(Proj(y))

Where the backbone is cut before its last stage, E is the tokens T that enter it, and what follows is the frozen rest R:

    logits = Head(R(y) + sum_l sigmoid(a'_l) Conv1x1'_l(F_l))

Without experts y = x and the model is the plain frozen backbone with a mask head.
Shapes: B images, C channels of the embedding, D of any other map, M experts, b bottleneck, K classes, H x W grid of the
backbone, h x w twice that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from icmoe.backbone import widths
from icmoe.contrast import prototype_pull, semantic_contrast
from icmoe.exchange import State, load_state
from icmoe.experts import Expert, make_experts
from icmoe.features import Features
from icmoe.kinds import names_of
from icmoe.losses import (
    counted_as_background,
    cross_entropy,
    dice_loss,
    halve,
    label_consistency,
    load_balance,
    router_anchor,
    router_z,
)
from icmoe.pointwise import Pointwise, mix_channels
from icmoe.router import Router
from icmoe.study import LossWeights, ModelShape, Study
from icmoe.voting import vote

HEAD_CHANNELS = 48
PROJECTION_CHANNELS = 64


@dataclass(frozen=True, slots=True)
class Output:
    """What the model says of a batch.

    Parameters
    ----------
    logits_BKhw
        Class logits on twice the backbone's grid: half of the input's resolution, where training takes place.
    fused_BCHW
        y, what the experts stand on after them.
    experts
        Votes, gates and router logits; None where the model has no experts.
    """

    logits_BKhw: Tensor
    fused_BCHW: Tensor
    experts: Votes | None


class Votes(NamedTuple):
    """What the experts and the router say of each pixel."""

    normed_BCHW: Tensor
    router_logits_BMHW: Tensor
    log_votes_BMKHW: Tensor
    gates_BMHW: Tensor

    def fused(self) -> Tensor:
        """Return the fused class probabilities sum_e g_e v_e, B K H W."""
        return (self.gates_BMHW.unsqueeze(2) * self.log_votes_BMKHW.exp()).sum(dim=1)


class Lateral(nn.Module):
    """sum_l sigmoid(a_l) Conv1x1_l(F_l) over the backbone's intermediate blocks; zero at start.

    Parameters
    ----------
    block_channels
        Channels of each block's features.
    channels
        C.
    """

    def __init__(self, block_channels: tuple[int, ...], channels: int) -> None:
        super().__init__()
        convs = [Pointwise(width, channels) for width in block_channels]
        for conv in convs:
            nn.init.zeros_(conv.weight)
            nn.init.zeros_(conv.bias)
        self.convs = nn.ModuleList(convs)
        self.gate_L = nn.Parameter(torch.zeros(len(block_channels)))

    def forward(self, blocks: tuple[Tensor, ...]) -> Tensor:
        """Return the sum over blocks, B C H W."""
        gated = zip(self.gate_L.sigmoid().unbind(), self.convs, blocks, strict=True)
        return torch.stack([gate * conv(block_BDHW) for gate, conv, block_BDHW in gated]).sum(dim=0)


class MaskHead(nn.Module):
    """From the fused embedding to class logits on twice its grid.

    Parameters
    ----------
    channels
        C.
    classes
        K.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.down = Pointwise(channels, HEAD_CHANNELS)
        self.norm = nn.GroupNorm(8, HEAD_CHANNELS)
        self.refine = nn.Conv2d(HEAD_CHANNELS, HEAD_CHANNELS // 2, 3, padding=1)
        self.classify = Pointwise(HEAD_CHANNELS // 2, classes)

    def forward(self, y_BCHW: Tensor) -> Tensor:
        """Return logits, B K 2H 2W."""
        narrow_BDHW = F.gelu(self.norm(self.down(y_BCHW)))
        narrow_BDhw = F.interpolate(narrow_BDHW, scale_factor=2.0, mode="bilinear", align_corners=False)
        logits_BKhw: Tensor = self.classify(F.gelu(self.refine(narrow_BDhw)))
        return logits_BKhw


class ICMoE(nn.Module):
    """The trained part: laterals, experts, router, vote head, mask head, projection.

    Parameters
    ----------
    shape
        Numbers of experts, widths, voting.
    classes
        K, at least 2.
    channels
        C of the backbone's features, a multiple of 8.
    block_channels
        Channels of each intermediate block; empty without block features.
    seed
        Origin of the initial weights; the global random state is left alone.
    behind
        Channels of the embedding, where the experts stand before the backbone's last stage and `channels` are its tokens'.
    """

    balance_bias_M: Tensor
    round_prototypes_KD: Tensor

    def __init__(
        self,
        shape: ModelShape,
        *,
        classes: int,
        channels: int,
        block_channels: tuple[int, ...],
        seed: int,
        behind: int | None = None,
    ) -> None:
        super().__init__()
        self.shape, self.behind = shape, behind
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.lateral = Lateral(block_channels, channels) if block_channels else None
            self.lateral_behind = Lateral(block_channels, behind) if block_channels and behind else None
            self.head = MaskHead(behind or channels, classes)
            self.project = Pointwise(channels, PROJECTION_CHANNELS)
            self.prototypes_KD = nn.Parameter(F.normalize(torch.randn(classes, PROJECTION_CHANNELS), dim=1))
            self.register_buffer("round_prototypes_KD", self.prototypes_KD.detach().clone(), persistent=False)
            if shape.experts:
                self.norm = nn.GroupNorm(8, channels)
                self.experts = make_experts(shape, channels=channels, classes=classes)
                self.router = Router(channels, shape.experts, shape.bottleneck, shape.router_noise)
                self.vote_head = Pointwise(channels, classes)
                # Moved by the server from the sites' usage, never by a gradient.
                self.register_buffer("balance_bias_M", torch.zeros(shape.experts))

    @property
    def expert_names(self) -> tuple[str, ...]:
        """Names of the experts in order."""
        return names_of(self.shape)

    def start_round(self) -> None:
        """Fix the prototypes that the contrast meets during this round."""
        with torch.no_grad():
            self.round_prototypes_KD.copy_(F.normalize(self.prototypes_KD, dim=1))

    def forward(self, features: Features, generator: torch.Generator | None = None) -> Output:
        """Return logits, fused embedding and votes.

        Parameters
        ----------
        features
            Of the frozen backbone.
        generator
            Source of the router's noise in training; None in evaluation.
        """
        x_BCHW = features.embedding_BCHW
        if self.lateral is not None:
            x_BCHW = x_BCHW + self.lateral(features.blocks)
        y_BCHW, votes = self._mix(x_BCHW, generator) if self.shape.experts else (x_BCHW, None)
        return Output(self.head(self._embedding(y_BCHW, features)), y_BCHW, votes)

    def _embedding(self, y_BCHW: Tensor, features: Features) -> Tensor:
        """Return what the mask head reads: y itself, or what the rest of the backbone makes of it, with laterals of its own."""
        if (features.rest is None) != (self.behind is None):
            raise ValueError("features of a backbone that is cut elsewhere")
        if features.rest is None:
            return y_BCHW
        embedding_BCHW = features.rest(y_BCHW)
        return embedding_BCHW if self.lateral_behind is None else embedding_BCHW + self.lateral_behind(features.blocks)

    def _mix(self, x_BCHW: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Votes]:
        normed_BCHW = self.norm(x_BCHW)
        hidden_BMbHW = torch.stack([expert(normed_BCHW) for expert in self.experts], dim=1)
        ups = [cast("Expert", expert).up for expert in self.experts]
        up_MCb, bias_MC = torch.stack([up.weight for up in ups]), torch.stack([up.bias for up in ups])
        log_votes_BMKHW = self._log_votes(x_BCHW, hidden_BMbHW, up_MCb, bias_MC)
        router_logits_BMHW = self.router(normed_BCHW, generator).float()
        gates_BMHW = vote(
            router_logits_BMHW,
            log_votes_BMKHW.exp(),
            self.balance_bias_M,
            top_k=self.shape.top_k,
            consensus=self.shape.consensus if self.shape.voting else 0.0,
        )
        # sum_e g_e up_e(h_e) as one matrix product over the gated hidden maps of all experts.
        gated_BXHW = torch.cat([(hidden_BMbHW * gates_BMHW.unsqueeze(2)).flatten(1, 2), gates_BMHW], dim=1)
        up_CX = torch.cat([up_MCb.permute(1, 0, 2).flatten(1), bias_MC.T], dim=1)
        y_BCHW = x_BCHW + mix_channels(gated_BXHW, up_CX)
        return y_BCHW, Votes(normed_BCHW, router_logits_BMHW, log_votes_BMKHW, gates_BMHW)

    def _log_votes(self, x_BCHW: Tensor, hidden_BMbHW: Tensor, up_MCb: Tensor, bias_MC: Tensor) -> Tensor:
        """Return log softmax_K(Vote(x + D_e)), B M K H W, from the narrow hidden maps: the vote head is linear."""
        head_KC = self.vote_head.weight
        shared_B1KHW: Tensor = self.vote_head(x_BCHW).unsqueeze(1)
        own_BMKN = torch.matmul(head_KC @ up_MCb, hidden_BMbHW.flatten(3)) + (bias_MC @ head_KC.T)[..., None]
        own_BMKHW = own_BMKN.view(*own_BMKN.shape[:3], *x_BCHW.shape[2:])
        return (shared_B1KHW + own_BMKHW).float().log_softmax(dim=2)

    def losses(
        self,
        features: Features,
        target_BKhw: Tensor,
        weights: LossWeights,
        generator: torch.Generator,
        anchor_router: Router | None = None,
        unknown: Sequence[int] = (),
    ) -> tuple[dict[str, Tensor], Output]:
        """Return every loss term that is switched on, one value per image (each B), and the output.

        Parameters
        ----------
        features
            Of the frozen backbone.
        target_BKhw
            Area fractions on twice the grid.
        weights
            Terms with weight 0 are not computed.
        generator
            Source of the router's noise and of the contrast's anchors.
        anchor_router
            The round's global router, where `weights.router_anchor` is on.
        unknown
            Classes that count as background, as in `icmoe.losses.counted_as_background`.
        """
        output = self(features, generator)
        log_p_BKhw = counted_as_background(output.logits_BKhw.float().log_softmax(dim=1), unknown, dim=1)
        terms: dict[str, Callable[[], Tensor]] = {
            "cross_entropy": lambda: cross_entropy(log_p_BKhw, target_BKhw),
            "dice": lambda: dice_loss(log_p_BKhw.exp(), target_BKhw),
        }
        target_BKHW = halve(target_BKhw)
        if output.experts is not None:
            votes = output.experts
            terms |= {
                "vote": lambda: cross_entropy(
                    counted_as_background(votes.fused().clamp(min=1e-7).log(), unknown, dim=1), target_BKHW
                ),
                "label_consistency": lambda: label_consistency(
                    votes.router_logits_BMHW, counted_as_background(votes.log_votes_BMKHW, unknown, dim=2), target_BKHW
                ),
                "load_balance": lambda: load_balance(votes.router_logits_BMHW, votes.gates_BMHW, target_BKHW),
                "router_z": lambda: router_z(votes.router_logits_BMHW),
            }
            if anchor_router is not None:
                terms["router_anchor"] = lambda: router_anchor(
                    votes.router_logits_BMHW, anchor_router(votes.normed_BCHW.detach()).float()
                )
        terms["contrast"] = lambda: self._contrast(features, output, target_BKHW, generator)
        return {name: term() for name, term in terms.items() if getattr(weights, name) > 0.0}, output

    def _contrast(self, features: Features, output: Output, target_BKHW: Tensor, generator: torch.Generator) -> Tensor:
        z_BDN = F.normalize(self.project(output.fused_BCHW).float(), dim=1).flatten(2)
        class_BN = target_BKHW.argmax(dim=1).flatten(1)
        if output.experts is not None:
            guess_BKHW = output.experts.fused()
        else:
            guess_BKHW = halve(output.logits_BKhw.detach())
        wrong_BN = guess_BKHW.argmax(dim=1).flatten(1) != class_BN
        frozen_BCN = features.embedding_BCHW.flatten(2)
        pull_B = prototype_pull(z_BDN, class_BN, F.normalize(self.prototypes_KD, dim=1))
        return semantic_contrast(z_BDN, frozen_BCN, class_BN, wrong_BN, self.round_prototypes_KD, generator) + pull_B


def total_loss(terms: dict[str, Tensor], weights: LossWeights) -> Tensor:
    """Return the batch mean of the weighted sum of the terms, a scalar."""
    return torch.stack([getattr(weights, name) * value.mean() for name, value in terms.items()]).sum()


def build_model(study: Study, *, seed: int) -> ICMoE:
    """Return the study's model with its seeded initial weights.

    Parameters
    ----------
    study
        The study.
    seed
        Origin of the initial weights.
    """
    channels, blocks, behind = widths(study.backbone)
    return ICMoE(study.model, classes=study.classes, channels=channels, block_channels=blocks, seed=seed, behind=behind)


def model_of(study: Study, state: State) -> ICMoE:
    """Return the study's model with these tensors, on the CPU.

    Parameters
    ----------
    study
        The study.
    state
        All tensors of the model.

    Raises
    ------
    IcmoeError
        301 where they are not the study's.
    """
    model = build_model(study, seed=0)
    load_state(model, state)
    return model

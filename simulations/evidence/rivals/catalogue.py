"""Every rival: how it is built, what it is fed with, how it may be trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from icmoe.backbone import Backbone, grid_of
from icmoe.model import build_model
from icmoe.study import Study
from simulations.evidence.rivals.adapter import adapter_head
from simulations.evidence.rivals.encoder import tail
from simulations.evidence.rivals.encoder_adapters import add_adapters
from simulations.evidence.rivals.lora import add_low_rank
from simulations.evidence.rivals.mask_head import PlainHead
from simulations.evidence.rivals.sam_decoder import SamDecoder
from simulations.evidence.rivals.segmenter import Segmenter
from simulations.evidence.rivals.unet import LARGE, SMALL, UNet

Weights = Mapping[str, Tensor] | None
Build = Callable[[Study, Backbone, Weights], nn.Module]

ON_FEATURES = ("fedavg", "pooled", "local", "ditto", "fedprox", "fedadam", "fedyogi")
ON_IMAGES = ("fedavg", "pooled")


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One rival.

    Parameters
    ----------
    title
        As tables show it.
    build
        From study, backbone and LiteMedSAM's tensors to the model, drawn from torch's random state.
    cut
        Where the encoder is cut (`simulations.evidence.rivals.encoder`); None for the study's own features.
    cells
        Cells of the logits along one side per cell of the backbone's grid.
    rate
        Peak learning rate over the study's: pretrained weights that move as a whole need a smaller one.
    regimes
        How it is trained.
    """

    title: str
    build: Build
    cut: int | None = None
    cells: int = 2
    rate: float = 1.0
    regimes: tuple[str, ...] = ON_IMAGES

    def side(self, study: Study) -> int:
        """Return the side of the logits and of the targets."""
        return self.cells * grid_of(study.backbone)


def _sam_decoder(study: Study, backbone: Backbone, weights: Weights) -> nn.Module:
    return Segmenter(nn.Identity(), SamDecoder(study.classes, backbone.grid, weights, whole=False))


def _samed(study: Study, backbone: Backbone, weights: Weights) -> nn.Module:
    encoder = tail(backbone, 1)
    add_low_rank(encoder)
    return Segmenter(encoder, SamDecoder(study.classes, backbone.grid, weights, whole=True))


def _msa(study: Study, backbone: Backbone, _weights: Weights) -> nn.Module:
    encoder = tail(backbone, 1)
    add_adapters(encoder)
    return Segmenter(encoder, PlainHead(study))


def _fine_tuned(cut: int) -> Build:
    """Return the builder of the mask head over an encoder that trains from stage `cut` on; batch norm keeps its statistics."""
    return lambda study, backbone, _: Segmenter(tail(backbone, cut).requires_grad_(requires_grad=True), PlainHead(study))


def _without_encoder(decoder: Callable[[Study], nn.Module]) -> Build:
    return lambda study, _, __: Segmenter(nn.Identity(), decoder(study))


def _unet(channels: tuple[int, ...]) -> Build:
    return _without_encoder(lambda study: UNet(study.classes, channels))


def _ours(study: Study, _backbone: Backbone, _weights: Weights) -> nn.Module:
    return build_model(study, seed=torch.initial_seed())


METHODS: dict[str, Method] = {
    "ic-moe": Method(title="IC-MoE, plain averaging, no balance bias", build=_ours, regimes=ON_FEATURES),
    "mask-head": Method(title="mask head alone", build=_without_encoder(PlainHead), regimes=ON_FEATURES),
    "adapter": Method(title="one adapter of IC-MoE's size", build=_without_encoder(adapter_head), regimes=ON_FEATURES),
    "sam-decoder": Method(title="frozen SAM decoder, no prompt", build=_sam_decoder, cells=4, regimes=ON_FEATURES),
    "unet-small": Method(title="U-Net, at most IC-MoE's size", build=_unet(SMALL), cut=0, cells=4),
    "unet-large": Method(title="U-Net, large", build=_unet(LARGE), cut=0, cells=4),
    "partial": Method(title="last stage and neck fine-tuned", build=_fine_tuned(3), cut=3, rate=0.1),
    "samed": Method(title="SAMed: LoRA and SAM decoder", build=_samed, cut=1, cells=4),
    "msa": Method(title="MSA: adapters in the encoder", build=_msa, cut=1),
    "full": Method(title="encoder fine-tuned as a whole", build=_fine_tuned(0), cut=0, rate=0.1),
}
"""From the cheapest to the dearest."""


def build(name: str, study: Study, backbone: Backbone, weights: Weights, *, seed: int) -> nn.Module:
    """Return the rival with its seeded initial weights; the global random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return METHODS[name].build(study, backbone, weights)

"""What the model says of each pixel of one picture: its class, how far the experts disagree, and which of them decides."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from icmoe.backbone import Backbone
from icmoe.features import Features
from icmoe.mixture import Mixture
from icmoe.model import ICMoE
from icmoe.preprocess import prepare, restore
from icmoe.voting import disagreement


@dataclass(frozen=True, slots=True)
class Maps:
    """Maps on the pixels of the picture, H x W each.

    Parameters
    ----------
    classes_HW
        Class index.
    disagreement_HW
        0 where the experts agree to 1; None where the model has no experts.
    experts_HW
        Index of the expert with the largest gate; None likewise.
    """

    classes_HW: npt.NDArray[np.uint8]
    disagreement_HW: npt.NDArray[np.float32] | None = None
    experts_HW: npt.NDArray[np.uint8] | None = None


@torch.no_grad()
def maps_of(model: ICMoE | Mixture, backbone: Backbone, image_HW: npt.NDArray[np.float32]) -> Maps:
    """Return the maps of one picture: logits are interpolated to its pixels, as in `icmoe.evaluation`, the largest is taken.

    Parameters
    ----------
    model
        In evaluation mode, on the backbone's device.
    backbone
        The study's.
    image_HW
        Upright grey values in [0, 1] on the scale of the series.
    """
    device = next(backbone.buffers()).device
    features = _rounded(backbone.encode(prepare(image_HW, backbone.image_size)[None].to(device)))
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        output = model(features)

    def on_pixels(maps_BXhw: Tensor) -> Tensor:
        return restore(maps_BXhw[0].float().cpu(), (image_HW.shape[0], image_HW.shape[1]))

    classes_HW = _largest(on_pixels(output.logits_BKhw))
    if output.experts is None:
        return Maps(classes_HW)
    votes_BMKHW, gates_BMHW = output.experts.log_votes_BMKHW.exp(), output.experts.gates_BMHW
    disagreement_1HW = on_pixels(disagreement(votes_BMKHW, gates_BMHW)[:, None]).clamp(0.0, 1.0)
    return Maps(classes_HW, disagreement_1HW[0].numpy(), _largest(on_pixels(gates_BMHW)))


def _rounded(features: Features) -> Features:
    """Return features as the cache of training keeps them: in half precision."""
    return Features(features.embedding_BCHW.half().float(), tuple(block.half().float() for block in features.blocks))


def _largest(maps_XHW: Tensor) -> npt.NDArray[np.uint8]:
    found: npt.NDArray[np.uint8] = maps_XHW.argmax(dim=0).to(torch.uint8).numpy()
    return found

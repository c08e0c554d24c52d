"""What the model says of each pixel of one picture: its class, how far the experts disagree, and which of them decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from icmoe.backbone import Backbone
from icmoe.evaluation import ALONE, mean_logits
from icmoe.features import Features, in_half
from icmoe.mixture import Mixture
from icmoe.model import ICMoE
from icmoe.preprocess import apply_view, prepare, restore, view_target
from icmoe.study import View
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
def maps_of(model: ICMoE | Mixture, backbone: Backbone, image_HW: npt.NDArray[np.float32], views: Sequence[View] = ALONE) -> Maps:
    """Return the maps of one picture: logits are interpolated to its pixels, as in `icmoe.evaluation`, the largest is taken.

    Parameters
    ----------
    model
        In evaluation mode, on the backbone's device.
    backbone
        The study's.
    image_HW
        Upright grey values in [0, 1] on the scale of the series.
    views
        Views of the picture whose class probabilities, gates and disagreements are averaged.

    Raises
    ------
    IcmoeError
        102 where the features do not fit into half precision.
    """
    prepared_3SS = prepare(image_HW, backbone.image_size)
    said = [_said(model, backbone, prepared_3SS, view) for view in views]

    def on_pixels(maps_BXhw: Tensor) -> Tensor:
        return restore(maps_BXhw[0].cpu(), (image_HW.shape[0], image_HW.shape[1]))

    classes_HW = _largest(on_pixels(mean_logits([logits_BKhw for logits_BKhw, _ in said])))
    experts = [maps_BXHW for _, maps_BXHW in said if maps_BXHW is not None]
    if not experts:
        return Maps(classes_HW)
    maps_XHW = on_pixels(torch.stack(experts).mean(dim=0))
    return Maps(classes_HW, maps_XHW[0].clamp(0.0, 1.0).numpy(), _largest(maps_XHW[1:]))


def _said(model: ICMoE | Mixture, backbone: Backbone, prepared_3SS: Tensor, view: View) -> tuple[Tensor, Tensor | None]:
    """Return log class probabilities of one view and, where there are experts, their disagreement followed by the gates.

    Both as the picture lies, whichever way the view does.
    """
    device = next(backbone.buffers()).device
    features = _rounded(backbone.encode(apply_view(prepared_3SS, view)[None].to(device)))
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        output = model(features)
    logits_BKhw = view_target(output.logits_BKhw.float().log_softmax(dim=1), view)
    if output.experts is None:
        return logits_BKhw, None
    gates_BMHW = output.experts.gates_BMHW
    apart_BHW = disagreement(output.experts.log_votes_BMKHW.exp(), gates_BMHW)
    return logits_BKhw, view_target(torch.cat([apart_BHW[:, None], gates_BMHW], dim=1).float(), view)


def _rounded(features: Features) -> Features:
    """Return features as the cache of training keeps them: in half precision, and refused where they do not fit into it."""
    embedding_BCHW, *blocks = (half.float() for half in in_half(features.embedding_BCHW, features.blocks).values())
    return Features(embedding_BCHW, tuple(blocks), features.rest)


def _largest(maps_XHW: Tensor) -> npt.NDArray[np.uint8]:
    found: npt.NDArray[np.uint8] = maps_XHW.argmax(dim=0).to(torch.uint8).numpy()
    return found

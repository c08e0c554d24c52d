"""Scores of a model on slices: predictions are brought back to the source's pixels and a patient is scored as a volume."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from icmoe.data.slices import Slice, load_truth
from icmoe.features import FeatureCache
from icmoe.metrics import PatientScore, patient_scores
from icmoe.preprocess import restore, view_target
from icmoe.study import Label, View

ALONE: tuple[View, ...] = ("identity",)
MIRRORED: tuple[View, ...] = ("identity", "flip")
"""Views of a picture at prediction."""
EVALUATION_BATCH = 16
ROUNDED = 1e-3
"""How far distances of one patient's slices may differ, as a share, that are the same."""

ClassMap = npt.NDArray[np.uint8]


@torch.no_grad()
def predict_slices(
    model: nn.Module,
    slices: Sequence[Slice],
    cache: FeatureCache,
    device: torch.device,
    *,
    views: Sequence[View] = ALONE,
) -> Iterator[ClassMap]:
    """Yield the class map of each slice, H W on its own pixel grid, in the order given.

    Parameters
    ----------
    model
        In evaluation mode on `device`.
    slices
        Their views must be in the cache.
    cache
        Where the features are.
    device
        CPU or CUDA.
    views
        Views of each image whose class probabilities are averaged.
    """
    for at in range(0, len(slices), EVALUATION_BATCH):
        chunk = slices[at : at + EVALUATION_BATCH]
        logits_BKhw = mean_logits([_log_probabilities(model, chunk, cache, device, view) for view in views])
        for item, logits_Khw in zip(chunk, logits_BKhw.cpu(), strict=True):
            yield restore(logits_Khw, item.shape).argmax(dim=0).to(torch.uint8).numpy()


def mean_logits(by_view: Sequence[Tensor]) -> Tensor:
    """Return the logarithm of the mean of probabilities, up to a constant, from their logarithms; one view is left alone."""
    return by_view[0] if len(by_view) == 1 else torch.stack(list(by_view)).logsumexp(dim=0)


def _log_probabilities(
    model: nn.Module, slices: Sequence[Slice], cache: FeatureCache, device: torch.device, view: View
) -> Tensor:
    """Return log class probabilities B K h w by one view, in the position of the identity view."""
    features = cache.load([cache.key(item.image_digest, view) for item in slices], device)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        logits_BKhw: Tensor = model(features).logits_BKhw
    return view_target(logits_BKhw.float().log_softmax(dim=1), view)


def score_slices(
    model: nn.Module,
    slices: Sequence[Slice],
    labels: Sequence[Label],
    cache: FeatureCache,
    device: torch.device,
    *,
    surfaces: bool = True,
    views: Sequence[View] = ALONE,
    on_patient: Callable[[], None] | None = None,
) -> list[PatientScore]:
    """Return one score per patient: its slices of this list, stacked in slice order, are one volume.

    Parameters
    ----------
    model
        In evaluation mode on `device`.
    slices
        Of any number of sites; ordered by site, patient and slice index.
    labels
        Of the study.
    cache, device
        As in `predict_slices`.
    surfaces
        Whether HD95 and surface Dice are wanted where the pixel size is known; they cost more than the prediction.
    views
        As in `predict_slices`.
    on_patient
        Called after each patient.
    """
    ordered = sorted(slices, key=lambda item: (item.site, item.patient, item.index))
    predictions = predict_slices(model, ordered, cache, device, views=views)
    scores = []
    for (site, patient), group in groupby(ordered, key=lambda item: (item.site, item.patient)):
        members = list(group)
        prediction = [next(predictions) for _ in members]
        truth = [load_truth(item, labels) for item in members]
        spacing_mm = common_spacing(members) if surfaces else None
        classes = patient_scores(_stack(prediction), _stack(truth), len(labels), spacing_mm)
        scores.append(PatientScore(site, patient, tuple(classes)))
        if on_patient is not None:
            on_patient()
    return scores


def common_spacing(slices: Sequence[Slice]) -> tuple[float, float, float] | None:
    """Return the spacing of a patient's slices in order, None where they are not one even stack on one grid of pixels.

    A slice that was left out between two others, or slices of several series, would lie where the volume does not show them.
    """
    first = slices[0]
    steps = {after.index - before.index for before, after in pairwise(slices)}
    if first.step is not None:  # as listed: of slices that lack every other one all steps are equal, and too wide
        steps.add(first.step)
    known = [item.spacing_mm for item in slices if item.spacing_mm is not None and item.shape == first.shape]
    if len(known) < len(slices) or len(steps) > 1 or 0 in steps:
        return None
    return known[0] if all(np.allclose(other, known[0], rtol=ROUNDED, atol=0.0) for other in known) else None


def _stack(slices: Sequence[ClassMap]) -> ClassMap:
    """Return a volume D H W; smaller slices are padded with background."""
    shapes = {item.shape for item in slices}
    if len(shapes) == 1:
        return np.stack(slices)
    height, width = max(shape[0] for shape in shapes), max(shape[1] for shape in shapes)
    return np.stack([np.pad(item, ((0, height - item.shape[0]), (0, width - item.shape[1]))) for item in slices])

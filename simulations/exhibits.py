"""Which test slices the report shows: the best, median and worst patient, on the slice with most of the truth."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from icmoe.data.slices import Slice, load_image, load_truth
from icmoe.evaluation import predict_slices
from icmoe.metrics import PatientScore
from icmoe.model import ICMoE
from icmoe.preprocess import restore
from icmoe.study import Label, Study
from simulations.overlays import Overlay
from simulations.scoring import Examiner, best_median_worst, patient_label


def overlays(examiner: Examiner, study: Study, model: ICMoE, patients: Sequence[PatientScore]) -> list[Overlay]:
    """Return an overlay for the best, median and worst patient; titles name the site, never the patient.

    Parameters
    ----------
    examiner
        Data, cache and device.
    study
        Labels.
    model
        In evaluation mode.
    patients
        Scores of the test patients.
    """
    shown = []
    for rank, patient in best_median_worst(patients):
        test = examiner.hospitals.sites[patient.site].of("test")
        rows = [item for item in test if patient_label(patient.site, item.site, item.patient) == patient.patient]
        item = fullest(rows, study.labels)
        (prediction_HW,) = predict_slices(model, [item], examiner.cache, examiner.site.torch_device())
        title = f"{rank} test patient, {patient.site}: Dice {patient.dice:.2f}"
        truth_HW, experts_HW = load_truth(item, study.labels), deciding(model, item, examiner)
        shown.append(Overlay(title, load_image(item), truth_HW, prediction_HW, experts_HW, model.expert_names))
    return shown


@torch.no_grad()
def deciding(model: ICMoE, item: Slice, examiner: Examiner) -> npt.NDArray[np.uint8] | None:
    """Return the index of the expert with the largest gate for each pixel of a slice, H W; None without experts."""
    key = examiner.cache.key(item.image_digest, "identity")
    votes = model(examiner.cache.load([key], examiner.site.torch_device())).experts
    if votes is None:
        return None
    found: npt.NDArray[np.uint8] = restore(votes.gates_BMHW[0].float().cpu(), item.shape).argmax(dim=0).to(torch.uint8).numpy()
    return found


def fullest(slices: Sequence[Slice], labels: Sequence[Label]) -> Slice:
    """Return the slice with most foreground, the first of them where several share it."""
    return max(slices, key=lambda item: (int((load_truth(item, labels) > 0).sum()), -item.index))

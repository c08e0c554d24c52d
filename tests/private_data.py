"""A site of made-up features for tests of privacy: patients with one or more slices, no image behind them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from icmoe.dataset import Batch
from icmoe.patient_batches import Sample
from icmoe.patient_gradients import BackEnd, Objective
from icmoe.privacy import private_sum
from icmoe.study import Study
from icmoe.study_privacy import SitePrivacy

SITE = {
    "noise_multiplier": 1.0,
    "delta": 1e-2,
    "patients": 6,
    "sample_rate": 0.5,
    "steps": 3,
    "clip_norm": 0.5,
    "slices_at_once": 4,
}
"""Privacy of a site in a study."""


class FeatureRows:
    """Stands where a `TrainingSet` does: rows of patients, views, and reading."""

    def __init__(self, study: Study, make_features, slices: list[int], seed: int = 0) -> None:
        self.features, self.target = make_features(study, batch=sum(slices), seed=seed)
        self.views = ("identity",)
        ends = torch.tensor(slices).cumsum(0).tolist()
        self.rows_of_patients = [list(range(end - count, end)) for end, count in zip(ends, slices, strict=True)]

    def read(self, rows, views, device: torch.device) -> Batch:
        return Batch(self.features.each(lambda tensor: tensor[list(rows)]), self.target[list(rows)])


def settled(model: torch.nn.Module, seed: int = 5) -> torch.nn.Module:
    """Return the model off its start, where zero-initialised layers hide most gradients."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def whole(rows: list[int]) -> list[Sample]:
    """A patient as one sample of all its slices."""
    return [Sample(tuple(rows), (0,) * len(rows))]


def changes(
    objective: Callable[[], Objective],
    data: FeatureRows,
    privacy: SitePrivacy,
    back_end: BackEnd,
    samples_of: Callable[[list[int]], list[Sample]] = whole,
) -> list[float]:
    """The leave-one-patient-out check: by how much each patient changes the sum of a step, in units of the sensitivity.

    A step keeps its promise where none of them is above 1.
    """

    def total(patients: list[list[int]]) -> torch.Tensor:
        samples = [sample for rows in patients for sample in samples_of(rows)]
        return private_sum(objective(), data, samples, privacy, torch.device("cpu"), back_end).double()

    everyone = total(data.rows_of_patients)
    others = [[rows for rows in data.rows_of_patients if rows is not left_out] for left_out in data.rows_of_patients]
    return [float((everyone - total(rest)).norm()) / privacy.sensitivity for rest in others]


def correlation(first: torch.Tensor, second: torch.Tensor) -> float:
    """The residuals check: how alike the noise of two releases is, from -1 to 1."""
    return float(torch.corrcoef(torch.stack([first, second]))[0, 1])

"""A site of made-up features for tests of privacy: patients with one or more slices, no image behind them."""

from __future__ import annotations

import torch

from icmoe.dataset import Batch
from icmoe.features import Features
from icmoe.study import Study


class FeatureRows:
    """Stands where a `TrainingSet` does: rows of patients, views, and reading."""

    def __init__(self, study: Study, make_features, slices: list[int], seed: int = 0) -> None:
        self.features, self.target = make_features(study, batch=sum(slices), seed=seed)
        self.views = ("identity",)
        ends = torch.tensor(slices).cumsum(0).tolist()
        self.rows_of_patients = [list(range(end - count, end)) for end, count in zip(ends, slices, strict=True)]

    def read(self, rows, views, device: torch.device) -> Batch:
        blocks = tuple(block[list(rows)] for block in self.features.blocks)
        return Batch(Features(self.features.embedding_BCHW[list(rows)], blocks), self.target[list(rows)])


def settled(model: torch.nn.Module, seed: int = 5) -> torch.nn.Module:
    """Return the model off its start, where zero-initialised layers hide most gradients."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model

"""Made-up patients, as seeded features without any image: what attacks and checks train on where no hospital is asked.

Shapes: B slices, K classes, H x W the backbone's grid.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from icmoe.backbone import grid_of, widths
from icmoe.config import parse
from icmoe.dataset import Batch, TrainingSet, to_device
from icmoe.features import Features
from icmoe.model import build_model
from icmoe.patient_batches import Sample
from icmoe.patient_gradients import Objective
from icmoe.rest import drawn_rest
from icmoe.study import Study
from icmoe.study_privacy import SitePrivacy

_FROZEN = ("head.", "lateral.", "lateral_behind.", "project.", "prototypes_KD")
_UNSETTLED = 0.1


class SeededRows(TrainingSet):
    """A training set in memory.

    Parameters
    ----------
    batch
        All slices.
    slices
        Slices of each patient, in the order of the rows.
    batch_size
        Of training without privacy.
    """

    def __init__(self, batch: Batch, slices: Sequence[int], *, batch_size: int = 8) -> None:
        self.batch = batch
        self.unknown = ()  # drawn at random, every class is there
        self.views = ("identity",)
        self.batch_size = min(batch_size, len(self))
        ends = torch.tensor(list(slices)).cumsum(0).tolist()
        self.rows_of_patients = [list(range(end - count, end)) for end, count in zip(ends, slices, strict=True)]

    def __len__(self) -> int:
        return len(self.batch.target_BKhw)

    def read(self, rows: Sequence[int], views: Sequence[int], device: torch.device) -> Batch:
        """Return the given slices in this order on `device`; there is one view only."""
        del views
        features, at = self.batch.features, list(rows)
        return to_device(Batch(features.each(lambda tensor: tensor[at]), self.batch.target_BKhw[at]), device)

    def batches(self, *, steps: int, seed: int, device: torch.device) -> Iterator[Batch]:
        """Yield batches in the order of every training set; they are in memory, so nothing is read ahead."""
        for rows, views in self._draws(steps, seed):
            yield self.read(rows, views, device)

    def of(self, patients: Sequence[int]) -> SeededRows:
        """Return the set of some of the patients."""
        rows = [row for patient in patients for row in self.rows_of_patients[patient]]
        counts = [len(self.rows_of_patients[patient]) for patient in patients]
        return SeededRows(self.read(rows, (), torch.device("cpu")), counts, batch_size=self.batch_size)


def seeded_rows(study: Study, slices: Sequence[int], *, seed: int) -> SeededRows:
    """Return patients with normal features, whose label depends on the first channel: there is something to learn.

    No weights of a backbone are asked for: where it is cut before its last stage, that stage is drawn too.

    Parameters
    ----------
    study
        Backbone and classes.
    slices
        Slices of each patient.
    seed
        Of the features.
    """
    generator = torch.Generator().manual_seed(seed)
    channels, blocks, behind = widths(study.backbone)
    grid, count = grid_of(study.backbone), sum(slices)

    def drawn(width: int) -> Tensor:
        return torch.randn(count, width, grid, grid, generator=generator)

    embedding_BCHW = drawn(channels)
    edges = torch.linspace(-1.5, 1.5, study.classes + 1)[1:-1]
    label_BHW = torch.bucketize(embedding_BCHW[:, 0].contiguous(), edges)
    target_BKHW = (label_BHW[:, None] == torch.arange(study.classes)[:, None, None]).float()
    target_BKhw = target_BKHW.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    rest = None if behind is None else drawn_rest(study.backbone, seed=seed)
    return SeededRows(Batch(Features(embedding_BCHW, tuple(drawn(width) for width in blocks), rest), target_BKhw), slices)


def seeded_bytes(study: Study, slices: int) -> int:
    """Return how much memory so many seeded slices take, and a copy of half of them as an attack makes."""
    channels, blocks, _ = widths(study.backbone)
    values = grid_of(study.backbone) ** 2 * (channels + sum(blocks) + 4 * study.classes)
    return round(1.5 * slices * values * torch.float32.itemsize)


def seeded_study(privacy: SitePrivacy) -> Study:
    """Return a small study with the given privacy; nothing in it draws at random besides the private step."""
    values = {
        "name": "privacy-audit",
        "seed": 1,
        "rounds": 1,
        "test_only": True,
        "labels": [{"name": "background", "values": [0]}, {"name": "lesion", "values": [1]}],
        # No backbone is loaded: the features are seeded.
        "backbone": {"name": "sam-vit-test", "digest": "0" * 64, "image_size": 32, "block_features": False},
        "model": {"basic_experts": 1, "semantic_experts": 1, "adaptive_experts": 1, "bottleneck": 8, "router_noise": 0.0},
        "loss": {"contrast": 0.0},
    }
    study = parse(Study, values, where="privacy audit")
    return study.model_copy(update={"privacy": study.privacy.model_copy(update={"site": privacy})})


def objective_of(study: Study, *, experts_only: bool = False) -> Objective:
    """Return the loss of a model in training mode, off its start: zero-initialised layers hide most gradients.

    Parameters
    ----------
    study
        Shape and losses.
    experts_only
        Leaves the mask head as it is: fewer coordinates.
    """
    model = build_model(study, seed=study.seed).train()
    generator = torch.Generator().manual_seed(study.seed)
    frozen = _FROZEN if experts_only else ("project.", "prototypes_KD")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(_UNSETTLED * torch.randn(parameter.shape, generator=generator))
            parameter.requires_grad_(not name.startswith(frozen))
    return Objective(model, study.loss, torch.Generator().manual_seed(study.seed))


def each_patient(data: TrainingSet) -> list[Sample]:
    """Return the samples of a step in which every patient takes part with all slices."""
    return [Sample(tuple(rows), (0,) * len(rows)) for rows in data.rows_of_patients]

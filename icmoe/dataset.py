"""Training slices as cached features and area-fraction targets; images themselves are not touched here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from icmoe.backbone import grid_of
from icmoe.data.slices import Slice, load_truth
from icmoe.device import moved
from icmoe.features import FeatureCache, Features
from icmoe.in_order import InOrder
from icmoe.preprocess import target, view_target
from icmoe.study import Study


@dataclass(frozen=True, slots=True)
class Batch:
    """Features of B images and their targets, B K h w, on the training device."""

    features: Features
    target_BKhw: Tensor

    def __len__(self) -> int:
        return len(self.target_BKhw)

    def part(self, start: int, end: int) -> Batch:
        """Return the images from `start` to before `end`, as views."""
        return Batch(self.features.each(lambda tensor: tensor[start:end]), self.target_BKhw[start:end])


class TrainingSet:
    """The training slices of one site.

    Parameters
    ----------
    slices
        At least one, in any order: a batch holds the same pictures whatever files and patients are called. Their
        features must be in the cache for every view of the study.
    study
        Labels, views and batch size.
    cache
        Where the features are.
    side
        Cells along one side of the targets; twice the backbone's grid, as IC-MoE is trained, where None.
    """

    def __init__(self, slices: Sequence[Slice], study: Study, cache: FeatureCache, *, side: int | None = None) -> None:
        if not slices:
            raise ValueError("a training set needs at least one slice")
        self.unknown = unknown_classes(slices, study)
        slices = sorted(slices, key=lambda item: item.image_digest)
        self.views = study.training.views
        self.batch_size = min(study.training.batch_size, len(slices))
        by_patient: dict[tuple[str, str], list[int]] = {}
        for row, item in enumerate(slices):
            by_patient.setdefault((item.site, item.patient), []).append(row)
        self.rows_of_patients = list(by_patient.values())
        self._cache = cache
        self._keys = [[cache.key(item.image_digest, view) for view in self.views] for item in slices]
        side = side or 2 * grid_of(study.backbone)
        self._target_NKhw = torch.empty(len(slices), study.classes, side, side)
        for target_Khw, item in zip(self._target_NKhw, slices, strict=True):  # a stack of them would be there twice
            target_Khw.copy_(target(load_truth(item, study.labels), study.classes, side))

    def __len__(self) -> int:
        return len(self._keys)

    def steps(self, epochs: int) -> int:
        """Return the number of steps of `epochs` passes."""
        return steps_of(len(self), self.batch_size, epochs)

    def batches(self, *, steps: int, seed: int, device: torch.device) -> Iterator[Batch]:
        """Yield `steps` batches in seeded order, the next one being read while the last one is used.

        Parameters
        ----------
        steps
            Number of batches.
        seed
            Fixes order and views.
        device
            Where the batch goes; on CUDA through pinned memory, without waiting.
        """
        draws, pinned = self._draws(steps, seed), device.type == "cuda"
        with InOrder("features", (partial(self._halves, *draw, pinned=pinned) for draw in draws), 1) as ahead:
            for rows, views in draws:
                # What waits is in half precision; nothing here holds on to a batch that is in use.
                yield Batch(self._cache.widened(ahead.take(), device), self._target(rows, views, device))

    def _draws(self, steps: int, seed: int) -> list[tuple[list[int], list[int]]]:
        """Return slice and view indices per step: one endless chain of permutations cut into batches.

        Within a pass no slice comes twice; a batch that ends one pass and begins the next may hold one twice.
        """
        rng = np.random.default_rng(seed)
        wanted = steps * self.batch_size
        order = np.concatenate([rng.permutation(len(self)) for _ in range(-(-wanted // len(self)) or 1)])[:wanted]
        views = rng.integers(len(self.views), size=wanted)
        cut = range(0, wanted, self.batch_size)
        return [(order[at : at + self.batch_size].tolist(), views[at : at + self.batch_size].tolist()) for at in cut]

    def read(self, rows: Sequence[int], views: Sequence[int], device: torch.device) -> Batch:
        """Return the given views of the given slices, in this order, on `device`."""
        halves = self._halves(rows, views, pinned=device.type == "cuda")
        return Batch(self._cache.widened(halves, device), self._target(rows, views, device))

    def _halves(self, rows: Sequence[int], views: Sequence[int], *, pinned: bool) -> list[Tensor]:
        return self._cache.halves([self._keys[row][view] for row, view in zip(rows, views, strict=True)], pinned=pinned)

    def _target(self, rows: Sequence[int], views: Sequence[int], device: torch.device) -> Tensor:
        targets = [view_target(self._target_NKhw[row], self.views[view]) for row, view in zip(rows, views, strict=True)]
        return moved(torch.stack(targets), device)


def untaught_classes(slices: Iterable[Slice], classes: int) -> tuple[int, ...]:
    """Return the classes, the background among them, that no slice shows."""
    shown = {index for item in slices for index in item.classes}
    return tuple(index for index in range(classes) if index not in shown)


def unknown_classes(slices: Iterable[Slice], study: Study) -> tuple[int, ...]:
    """Return the classes that count as background in the site's loss; none where it shows no class: it teaches what is none."""
    untaught = set(untaught_classes(slices, study.classes)) - {0}
    if study.training.untaught == "background" or len(untaught) == study.classes - 1:
        return ()
    return tuple(sorted(untaught))


def steps_of(slices: int, batch_size: int, epochs: int) -> int:
    """Return the number of steps of `epochs` passes over `slices` slices; a batch is never larger than a pass."""
    return epochs * -(-slices // min(batch_size, slices))


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return the batch on `device`; a rest of the backbone stays where it is."""
    return Batch(batch.features.each(lambda tensor: moved(tensor, device)), moved(batch.target_BKhw, device))

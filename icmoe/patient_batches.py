"""Which patients take part in a step, with which slices, and in what groups they are computed.

Shapes: P patients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from icmoe.os_random import uniform


@dataclass(frozen=True, slots=True)
class Sample:
    """What one patient contributes to a step.

    Parameters
    ----------
    rows
        Slices, at least one.
    views
        One view per slice.
    """

    rows: tuple[int, ...]
    views: tuple[int, ...]


def draw_patients(patients: int, sample_rate: float) -> list[int]:
    """Return who takes part: each of `patients` independently with probability `sample_rate` (Poisson sampling)."""
    return np.flatnonzero(uniform(patients) < sample_rate).tolist()


def draw_samples(rows_of: Sequence[Sequence[int]], sample_rate: float, *, slices: int, views: int) -> list[Sample]:
    """Return the step's samples, possibly none.

    Parameters
    ----------
    rows_of
        Slices of each patient.
    sample_rate
        Probability of a patient.
    slices
        Most slices of a patient, drawn without replacement.
    views
        Number of views to draw from.
    """
    samples = []
    for patient in draw_patients(len(rows_of), sample_rate):
        # Secret entropy, but not the kernel's for each bit: which of its own slices a patient shows is no part of the promise.
        rng = np.random.default_rng()
        rows = rng.permutation(np.asarray(rows_of[patient]))[:slices]
        samples.append(Sample(tuple(rows.tolist()), tuple(rng.integers(views, size=len(rows)).tolist())))
    return samples


def grouped(samples: Sequence[Sample], slices_at_once: int) -> Iterator[list[Sample]]:
    """Yield the samples in groups of at most `slices_at_once` slices; a patient is never torn apart.

    A patient with more slices than that is a group of its own.
    """
    group: list[Sample] = []
    for sample in samples:
        if group and sum(len(one.rows) for one in (*group, sample)) > slices_at_once:
            yield group
            group = []
        group.append(sample)
    if group:
        yield group

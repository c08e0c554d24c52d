"""Named checks of the product's own private step; together they tell a right one from the usual broken ones.

| check | what it finds |
| --- | --- |
| `canary_bound` | noise that is missing or too small |
| `leave_one_patient_out` | clipping that is off; slices drawn or clipped one by one while a patient is promised |
| `fresh_noise` | noise that comes back: the same each round, or from a seed of the run |

A check calls `private_mean` and `private_sum` of `icmoe/privacy.py`, not copies of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from icmoe.gaussian import noise_for
from icmoe.patient_gradients import Objective, back_end_for
from icmoe.privacy import private_mean, private_sum
from icmoe.privacy_audit.canaries import audit_canaries
from icmoe.privacy_audit.seeded import SeededRows, each_patient, objective_of, seeded_rows, seeded_study
from icmoe.study_privacy import SitePrivacy

CLAIMED_EPSILON, DELTA = 1.0, 1e-5
CANARIES = 40_000
"""With fewer the bound tells half the noise from the whole less surely: expected misses are 1 in 10 000 (`one_run.py`)."""

_ROUNDING = 1e-5
_LARGEST_CORRELATION = 6.0  # standard deviations: a right version is accused once in 10^8 runs or so
_ROUNDS = 4
_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check says.

    Parameters
    ----------
    name
        Of the check.
    passed
        Whether nothing was found.
    measured, limit
        The figure and what it must not exceed.
    what
        What was measured, with its unit.
    """

    name: str
    passed: bool
    measured: float
    limit: float
    what: str


def canary_bound(seed: int = 0, canaries: int = CANARIES) -> Finding:
    """Return whether one noisy release of orthogonal canaries gives away more than the claimed epsilon of 1."""
    sigma = noise_for(CLAIMED_EPSILON, DELTA, 1)
    privacy = _privacy(sigma)
    audit = audit_canaries(privacy, sigma=sigma, steps=1, claimed_epsilon=CLAIMED_EPSILON, canaries=canaries, seed=seed)
    what = f"lower bound on epsilon, confidence {audit.confidence:.0%}, {audit.correct} of {audit.guesses} guesses right"
    return Finding("canary_bound", audit.kept, audit.lower_bound, audit.claimed_epsilon, what)


def leave_one_patient_out(seed: int = 0) -> Finding:
    """Return whether one patient more or less moves the sum of a step by more than the sensitivity.

    Each patient's slices are alike, so that their gradients add up where they are not clipped together; one patient is
    unlike the others, so that its gradient is long. Patients are drawn by the product's own sampling at rate 1.
    """
    privacy = _privacy(sigma=1.0)
    study = seeded_study(privacy)
    objective = objective_of(study)
    data = _alike(seeded_rows(study, [1, 6, 3, 4], seed=seed))
    data.batch.features.embedding_BCHW[0] *= 50.0
    patients = range(len(data.rows_of_patients))
    whole = _sum_of_a_step(objective, data, privacy)
    changes = [whole - _sum_of_a_step(objective, data.of([p for p in patients if p != out]), privacy) for out in patients]
    measured = max(float(change.double().norm()) for change in changes) / privacy.sensitivity
    what = "largest change by one patient, in units of the sensitivity"
    return Finding("leave_one_patient_out", measured <= 1.0 + _ROUNDING, measured, 1.0 + _ROUNDING, what)


def fresh_noise(seed: int = 0) -> Finding:
    """Return whether the noise of two rounds is alike, also where both begin with the same seed of the run.

    The residual of a round is what is released less the sum itself, which only the site knows.
    """
    privacy = _privacy(sigma=1.0)
    study = seeded_study(privacy)
    objective = objective_of(study)
    data = seeded_rows(study, [1, 2], seed=seed)
    known_X = private_sum(objective, data, each_patient(data), privacy, _CPU, back_end_for(_CPU)).double()
    residuals = []
    for _ in range(_ROUNDS):
        with _run_seeded(seed):
            mean_X = private_mean(objective, data, privacy, 1.0, _CPU, back_end_for(_CPU))
        residuals.append((mean_X.double() * privacy.expected_batch - known_X).numpy())
    correlation = np.corrcoef(residuals)
    measured = float(np.nan_to_num(np.abs(correlation[np.triu_indices(_ROUNDS, 1)]), nan=1.0).max())
    limit = _LARGEST_CORRELATION / len(known_X) ** 0.5
    return Finding("fresh_noise", measured <= limit, measured, limit, "largest correlation of the noise of two rounds")


CHECKS: dict[str, Callable[[], Finding]] = {check.__name__: check for check in (canary_bound, leave_one_patient_out, fresh_noise)}


def _privacy(sigma: float) -> SitePrivacy:
    return SitePrivacy(noise_multiplier=sigma, delta=DELTA, patients=4, sample_rate=1.0, steps=1, clip_norm=0.1, usage_clip=0.02)


@contextmanager
def _run_seeded(seed: int) -> Iterator[None]:
    """Seed the global generators, from which a careless noise would draw, and put them back afterwards."""
    state = np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        try:
            yield
        finally:
            np.random.set_state(state)  # noqa: NPY002


def _sum_of_a_step(objective: Objective, data: SeededRows, privacy: SitePrivacy) -> Tensor:
    """Return the sum of a step without its noise, D + M: the release in which the noise multiplier is 0."""
    return private_mean(objective, data, privacy, 0.0, _CPU, back_end_for(_CPU)) * privacy.expected_batch


def _alike(data: SeededRows) -> SeededRows:
    """Return the set in which every slice of a patient is its first one."""
    firsts = [rows[0] for rows in data.rows_of_patients for _ in rows]
    return SeededRows(data.read(firsts, (), _CPU), [len(rows) for rows in data.rows_of_patients])

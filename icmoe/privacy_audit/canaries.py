"""White-box audit: orthogonal canaries in gradient space through the product's own private step.

A canary is a made-up patient whose gradient points along one coordinate of its own, far longer than the clipping norm. It
takes part by a fair coin. The auditor sees every noised mean and scores each canary by its coordinate, which is the inner
product of the release with the canary's direction. The canaries of one model are orthogonal; where
more are wanted than there are coordinates, further models are run beside it, each with canaries of its own: together
they are one mechanism with the same promise to each canary, since a patient is in one of them only.

Shapes: m canaries, P canaries of a group, D trained coordinates, X = D + M with
the usage of M experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from icmoe.dataset import Batch, TrainingSet
from icmoe.patient_gradients import Block, Objective, back_end_for
from icmoe.privacy import private_mean, private_sum
from icmoe.privacy_audit.one_run import CONFIDENCE, correct_guesses, epsilon_lower_bound, planned_guesses
from icmoe.privacy_audit.seeded import SeededRows, each_patient, objective_of, seeded_rows, seeded_study
from icmoe.study_privacy import SitePrivacy

_LENGTH = 10.0  # of a canary's gradient in clipping norms: it is clipped like any patient's
_AT_ONCE = 64  # canaries of a group; keeps P x D small
_PATIENTS = 4  # seeded patients that train beside the canaries
_CPU = torch.device("cpu")

Scores = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class CanaryAudit:
    """What a run of canaries showed.

    Parameters
    ----------
    claimed_epsilon, delta
        What the private step promises.
    canaries, guesses, correct
        m, r and v of the theorem.
    lower_bound
        On epsilon, with `confidence`.
    confidence
        Of the bound.
    """

    claimed_epsilon: float
    delta: float
    canaries: int
    guesses: int
    correct: int
    lower_bound: float
    confidence: float = CONFIDENCE

    @property
    def kept(self) -> bool:
        """Whether the bound leaves the claim standing."""
        return self.lower_bound <= self.claimed_epsilon


def audit_canaries(
    privacy: SitePrivacy, *, sigma: float, steps: int, claimed_epsilon: float, canaries: int, seed: int
) -> CanaryAudit:
    """Return what guesses about `canaries` coins show of the private step.

    Parameters
    ----------
    privacy
        Clipping norms, rate and delta.
    sigma
        Noise multiplier that the claim rests on.
    steps
        Releases, over all rounds.
    claimed_epsilon
        Of all releases at `privacy.delta`.
    canaries
        m, at least 2.
    seed
        Of coins and seeded patients; noise and sampling come from the operating system.
    """
    rng = np.random.default_rng(seed)
    taken_m = rng.random(canaries) < 0.5
    privacy = privacy.model_copy(update={"slices_at_once": _AT_ONCE})
    objective = objective_of(seeded_study(privacy), experts_only=True)
    groups = np.array_split(taken_m, -(-canaries // objective.coordinates))
    scores = [_scores(objective, privacy, group, sigma, steps, int(rng.integers(2**31))) for group in groups]
    guesses = planned_guesses(canaries, epsilon=claimed_epsilon, delta=privacy.delta)
    correct = correct_guesses(np.concatenate(scores), taken_m, guesses)
    bound = epsilon_lower_bound(canaries, guesses, correct, delta=privacy.delta)
    return CanaryAudit(
        claimed_epsilon=claimed_epsilon,
        delta=privacy.delta,
        canaries=canaries,
        guesses=guesses,
        correct=correct,
        lower_bound=bound,
    )


def _scores(
    objective: Objective, privacy: SitePrivacy, taken_m: npt.NDArray[np.bool_], sigma: float, steps: int, seed: int
) -> Scores:
    """Return the log of the likelihood ratio of "takes part", up to a constant, summed over the steps."""
    patients = seeded_rows(seeded_study(privacy), [1] * _PATIENTS, seed=seed)
    data = _CanaryRows(patients, np.flatnonzero(taken_m).tolist())
    back_end = partial(_marked_gradients, length=_LENGTH * privacy.clip_norm)
    others_X = private_sum(objective, patients, each_patient(patients), privacy, _CPU, back_end_for(_CPU)).double()
    score_m = np.zeros(len(taken_m))
    for _ in range(steps):
        mean_X = private_mean(objective, data, privacy, sigma, _CPU, back_end).double()
        seen_X = mean_X * privacy.expected_batch - privacy.sample_rate * others_X
        score_m += _log_ratio(seen_X[: len(taken_m)].numpy() / privacy.clip_norm, privacy, sigma)
    return score_m


def _log_ratio(seen_m: Scores, privacy: SitePrivacy, sigma: float) -> Scores:
    """Return the log of (1 - q) + q N(x; 1, s^2) / N(x; 0, s^2) for each canary's coordinate x, in clipping norms.

    The claimed noise s stands in it whatever is really added; at q = 1 the order is that of x alone.
    """
    deviation = sigma * privacy.sensitivity / privacy.clip_norm
    drawn_m: Scores = np.log(privacy.sample_rate) + (seen_m - 0.5) / deviation**2
    if privacy.sample_rate == 1.0:
        return drawn_m
    ratio_m: Scores = np.logaddexp(np.log1p(-privacy.sample_rate), drawn_m)
    return ratio_m


@dataclass(frozen=True, slots=True)
class _Marked(Batch):
    """Slices of patients, and the coordinates of the canaries of the group."""

    coordinates: tuple[int, ...]


class _CanaryRows(TrainingSet):
    """The patients, and a row for each canary that takes part."""

    def __init__(self, patients: SeededRows, coordinates: Sequence[int]) -> None:
        self.patients = patients
        self.coordinates = coordinates
        self.views = patients.views
        first = len(patients)
        self.rows_of_patients = [*patients.rows_of_patients, *([first + at] for at in range(len(coordinates)))]

    def read(self, rows: Sequence[int], views: Sequence[int], device: torch.device) -> Batch:
        first = len(self.patients)
        batch = self.patients.read([row for row in rows if row < first], views, device)
        coordinates = tuple(self.coordinates[row - first] for row in rows if row >= first)
        return _Marked(batch.features, batch.target_BKhw, coordinates)


def _marked_gradients(
    objective: Objective, batch: Batch, counts: Sequence[int], slices_at_once: int, *, length: float
) -> Iterator[Block]:
    """Yield gradients and usage of a group: of patients by the device's back end, of canaries along their coordinates."""
    assert isinstance(batch, _Marked)
    slices, canaries = len(batch.target_BKhw), len(batch.coordinates)
    if slices:
        yield from back_end_for(_CPU)(objective, batch, counts[: len(counts) - canaries], slices_at_once)
    gradient_PD = torch.zeros(canaries, objective.coordinates)
    gradient_PD[torch.arange(canaries), list(batch.coordinates)] = length
    yield gradient_PD, torch.zeros(canaries, objective.model.shape.experts)

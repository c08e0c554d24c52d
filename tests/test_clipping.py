"""The algebra of a private step and its randomness: bounds, noise of the right size, draws nobody can repeat."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy.stats import kstest

from icmoe import os_random
from icmoe.clipping import clipped, clipped_sum, noised, usage_of
from icmoe.patient_batches import Sample, draw_patients, draw_samples, grouped
from icmoe.privacy import noised_score
from icmoe.study_privacy import SitePrivacy
from tests.private_data import correlation

PRIVACY = SitePrivacy(noise_multiplier=1.5, delta=1e-3, patients=100, sample_rate=0.25, steps=4, clip_norm=2.0, usage_clip=0.5)
VALUES = st.floats(-(2.0**100), 2.0**100, width=32)
rows = arrays.arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(1, 8)), elements=VALUES)


@given(vector=rows, bound=st.floats(1e-3, 1e3))
def test_no_row_is_longer_than_the_bound_and_short_rows_stay(vector, bound: float) -> None:
    vector_PX = torch.from_numpy(vector)
    found = clipped(vector_PX, bound).double().norm(dim=1)
    before = vector_PX.double().norm(dim=1)
    assert (found <= bound * (1 + 1e-6)).all()
    short = before <= bound
    assert torch.equal(clipped(vector_PX, bound)[short], vector_PX[short])
    assert torch.allclose(found[~short], torch.full_like(found[~short], bound), rtol=1e-4)


@given(vector=rows, scale=st.floats(1.0, 1e3))
def test_clipping_keeps_directions_and_forgets_length_beyond_the_bound(vector, scale: float) -> None:
    vector_PX = torch.from_numpy(vector).clamp(-1e6, 1e6)
    once = clipped(vector_PX, 1.0)
    assert torch.allclose(clipped(once, 1.0), once, rtol=1e-6)
    far = vector_PX.double().norm(dim=1) >= 1.0
    assert torch.allclose(clipped(vector_PX * scale, 1.0)[far], once[far], atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_patient_whose_gradient_is_not_finite_adds_nothing(bad: float) -> None:
    gradient_PD = torch.tensor([[3.0, 4.0], [bad, 1.0]])
    usage_PM = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    assert torch.allclose(clipped_sum(gradient_PD, usage_PM, PRIVACY)[:2], torch.tensor([1.2, 1.6]))


@given(
    gradient=arrays.arrays(np.float32, (5, 7), elements=VALUES),
    usage=arrays.arrays(np.float32, (5, 3), elements=st.floats(0, 1024, width=32)),
    left_out=st.integers(0, 4),
)
def test_one_patient_changes_the_sum_by_no_more_than_its_sensitivity(gradient, usage, left_out: int) -> None:
    gradient_PD, usage_PM = torch.from_numpy(gradient).double(), torch.from_numpy(usage).double()
    kept = [row for row in range(5) if row != left_out]
    change = clipped_sum(gradient_PD, usage_PM, PRIVACY) - clipped_sum(gradient_PD[kept], usage_PM[kept], PRIVACY)
    assert change.norm() <= PRIVACY.sensitivity * (1 + 1e-5)
    assert pytest.approx(math.sqrt(2.0**2 + 0.5**2)) == PRIVACY.sensitivity


def test_the_noise_has_the_claimed_size_and_a_normal_shape() -> None:
    size = 20000
    mean = noised(torch.zeros(size), PRIVACY, 1.5)
    sigma = 1.5 * PRIVACY.sensitivity / 25.0
    assert float(mean.std()) == pytest.approx(sigma, rel=0.03)
    assert kstest(mean.double().numpy() / sigma, "norm").pvalue > 1e-6
    assert torch.allclose(noised(torch.full((3,), 1e9), PRIVACY, 1e-6), torch.tensor(1e9 / 25.0))  # the public divisor


def test_equal_seeds_do_not_give_equal_noise_and_steps_are_uncorrelated() -> None:
    def noise() -> torch.Tensor:
        torch.manual_seed(1)
        np.random.seed(1)  # noqa: NPY002  (the point: no seed has a say)
        return noised(torch.zeros(5000), PRIVACY, 1.5)

    first, second = noise(), noise()
    assert not torch.equal(first, second)
    assert abs(correlation(first, second)) < 0.09  # six standard errors


def test_the_same_noise_every_round_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("icmoe.clipping.gaussian", lambda count: np.random.default_rng(1).standard_normal(count))
    first, second = (noised(torch.zeros(5000), PRIVACY, 1.5) for _ in range(2))
    assert correlation(first, second) > 0.99


def test_draws_come_from_the_kernel_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os_random.os, "urandom", lambda count: b"\x00" * count)
    assert (os_random.uniform(3) == 2.0**-53).all()  # never 0, whose normal value is infinite
    assert np.isfinite(os_random.gaussian(3)).all()
    monkeypatch.setattr(os_random.os, "urandom", lambda count: b"\xff" * count)
    assert (os_random.uniform(3) < 1.0).all()
    assert draw_patients(4, 1.0) == [0, 1, 2, 3]


def test_each_patient_is_drawn_at_the_rate_and_independently() -> None:
    draws = np.zeros((4000, 20), dtype=bool)
    for row in draws:
        row[draw_patients(20, 0.25)] = True
    assert np.abs(draws.mean(axis=0) - 0.25).max() < 0.036  # more than five standard errors
    counts = draws.sum(axis=1)
    assert counts.var() == pytest.approx(20 * 0.25 * 0.75, rel=0.15)  # of a binomial, not of a fixed batch
    assert counts.min() < 2
    assert draw_patients(0, 0.5) == []


def test_a_patients_slices_are_one_sample_of_at_most_so_many() -> None:
    rows_of = [[0], [1, 2, 3], list(range(4, 30))]
    samples = draw_samples(rows_of, 1.0, slices=8, views=2)
    assert [len(sample.rows) for sample in samples] == [1, 3, 8]
    assert all(len(set(sample.rows)) == len(sample.rows) == len(sample.views) for sample in samples)
    assert all(set(sample.rows) <= set(rows) for sample, rows in zip(samples, rows_of, strict=True))
    many = [draw_samples(rows_of, 1.0, slices=8, views=2)[2] for _ in range(60)]
    assert {row for sample in many for row in sample.rows} == set(rows_of[2])
    assert {view for sample in many for view in sample.views} == {0, 1}
    assert draw_samples([], 0.5, slices=8, views=2) == []


@given(counts=st.lists(st.integers(1, 9), max_size=12), limit=st.integers(1, 12))
def test_groups_keep_order_patients_and_the_limit(counts: list[int], limit: int) -> None:
    samples = [Sample(tuple(range(count)), (0,) * count) for count in counts]
    groups = list(grouped(samples, limit))
    assert [sample for group in groups for sample in group] == samples
    assert all(len(group) == 1 or sum(len(sample.rows) for sample in group) <= limit for group in groups)


def test_usage_comes_back_on_the_simplex() -> None:
    scaled = torch.tensor([0.7, -0.1, 0.3]) * PRIVACY.usage_scale
    assert usage_of(scaled, PRIVACY) == pytest.approx((0.7, 0.0, 0.3))
    assert usage_of(torch.tensor([-0.1, 0.01, 0.0]), PRIVACY) == (1 / 3,) * 3
    assert usage_of(torch.full((2,), float("nan")), PRIVACY) == (0.5, 0.5)
    assert usage_of(torch.zeros(0), PRIVACY) == ()


def test_a_score_is_noised_and_stays_in_range() -> None:
    loud = PRIVACY
    found = [noised_score([0.9] * 3, loud) for _ in range(300)]
    assert all(0.0 <= dice <= 1.0 and patients >= 1 for dice, patients in found)
    assert len({dice for dice, _ in found}) > 50
    quiet = loud.model_copy(update={"score_noise": 1e-6})
    assert noised_score([0.9, 0.7], quiet) == (pytest.approx(0.8, abs=1e-3), 2)
    assert noised_score([7.0, 0.0], quiet) == (pytest.approx(0.5, abs=1e-3), 2)  # one patient counts for no more than 1
    assert noised_score([], quiet) == (pytest.approx(0.5, abs=1e-3), 1)


def test_the_noise_of_a_score_is_as_large_as_one_patient_can_change_sum_and_number_together() -> None:
    setting = PRIVACY.model_copy(update={"score_noise": 10.0})
    found = [noised_score([0.5] * 1000, setting) for _ in range(600)]
    sums, numbers = [2.0 * (dice - 0.5) * patients for dice, patients in found], [patients for _, patients in found]
    assert statistics.stdev(numbers) == pytest.approx(10.0 * 2.0**0.5, rel=0.15)  # five standard errors
    assert statistics.stdev(sums) == pytest.approx(10.0 * 2.0**0.5, rel=0.15)

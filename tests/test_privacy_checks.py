"""Deliberately broken versions of the private step, each caught by the check that is there for it; the right one passes all.

What is broken is the product's own code: a part of `icmoe/privacy.py` is replaced, nothing of the checks.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from icmoe import clipping, privacy
from icmoe.patient_batches import Sample
from icmoe.privacy_audit.checks import CHECKS, canary_bound, fresh_noise, leave_one_patient_out

right_noise = clipping.noised


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch):
    return lambda name, replacement: monkeypatch.setattr(privacy, name, replacement)


def test_the_right_version_passes_every_check() -> None:
    findings = [check() for check in CHECKS.values()]
    assert [finding.name for finding in findings if not finding.passed] == []
    assert [finding.name for finding in findings] == ["canary_bound", "leave_one_patient_out", "fresh_noise"]
    bound, change, correlation = (finding.measured for finding in findings)
    assert bound > 0.2  # the audit sees the canaries at all
    assert change > 0.9  # the sensitivity is used, so that more of it would show
    assert 0.0 < correlation < 0.06


def test_noise_off_is_caught_by_the_canaries(broken) -> None:
    broken("noised", lambda total, setting, sigma: right_noise(total, setting, 0.0 * sigma))
    finding = canary_bound(canaries=2000)
    assert not finding.passed
    assert finding.measured > 2.0


def test_noise_at_half_is_caught_by_the_canaries(broken) -> None:
    broken("noised", lambda total, setting, sigma: right_noise(total, setting, 0.5 * sigma))
    finding = canary_bound()
    assert not finding.passed
    assert 1.0 < finding.measured < 2.2  # half the noise is epsilon 2.15: the bound is one


def test_clipping_off_is_caught_by_leaving_one_out(broken) -> None:
    broken("clipped_sum", lambda gradient, usage, setting: torch.cat([gradient, setting.usage_scale * usage], dim=1).sum(dim=0))
    finding = leave_one_patient_out()
    assert not finding.passed
    assert finding.measured > 2.0


def test_slices_sampled_while_patients_are_promised_are_caught_by_leaving_one_out(broken) -> None:
    def by_slice(rows_of, sample_rate, *, slices, views):
        del slices, views
        rows = [row for patient in rows_of for row in patient]
        return [Sample((row,), (0,)) for row in rows if np.random.default_rng().random() < sample_rate]

    broken("draw_samples", by_slice)
    finding = leave_one_patient_out()
    assert not finding.passed
    assert finding.measured == pytest.approx(6.0, rel=0.05)  # the patient with six slices counts six times


@pytest.mark.parametrize("seeded", ["each round anew", "by the run"])
def test_the_same_noise_every_round_is_caught_by_its_correlation(seeded: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def repeated(count: int) -> np.ndarray:
        if seeded == "by the run":
            return torch.randn(count, dtype=torch.float64).numpy()
        return np.random.default_rng(7).standard_normal(count)

    monkeypatch.setattr(clipping, "gaussian", repeated)
    finding = fresh_noise()
    assert not finding.passed
    assert finding.measured > 0.99


def test_the_bound_exceeds_the_claim_in_at_most_three_of_twenty_runs() -> None:
    findings = [canary_bound(seed) for seed in range(20)]
    assert sum(finding.measured > 1.0 for finding in findings) <= 3
    assert np.median([finding.measured for finding in findings]) > 0.4

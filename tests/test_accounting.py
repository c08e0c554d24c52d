"""Epsilon: equal to Google's library for the same history, monotone, never above a target, one figure for a whole study."""

from __future__ import annotations

import math

import pytest
from dp_accounting import DpEvent, GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st

from icmoe.accounting import Spending, epsilon, noise_multiplier, score_spending, study_epsilon, study_spending, training_spending
from icmoe.errors import IcmoeError

SITE = {"epsilon": 3.0, "delta": 1e-3, "patients": 100, "sample_rate": 0.2, "steps": 10}
HISTORIES = {
    "usual": [Spending(1.5, 0.1, 400)],
    "many steps": [Spending(1.1, 1 / 1024, 14000)],
    "every patient each time": [Spending(4.0, 1.0, 10)],
    "little epsilon": [Spending(20.0, 0.1, 400)],
    "two studies": [Spending(1.5, 0.1, 100), Spending(3.0, 0.25, 40)],
    "with scores": [Spending(2.0, 0.1, 200), Spending(10.0, 1.0, 11)],
}


def event(one: Spending) -> DpEvent:
    return SelfComposedDpEvent(PoissonSampledDpEvent(one.sample_rate, GaussianDpEvent(one.noise_multiplier)), one.steps)


@pytest.mark.parametrize("history", HISTORIES.values(), ids=HISTORIES)
def test_epsilon_agrees_with_dp_accounting_to_one_percent(history: list[Spending]) -> None:
    for accountant, theirs in (("prv", PLDAccountant()), ("rdp", RdpAccountant())):
        for one in history:
            theirs.compose(event(one))
        other = theirs.get_epsilon(1e-4)
        ours = epsilon(history, delta=1e-4, accountant=accountant)
        assert ours == pytest.approx(other, rel=0.01), accountant
        if accountant == "prv":
            assert ours >= 0.999 * other  # an upper bound


def test_a_known_history_keeps_its_figure() -> None:
    assert epsilon([Spending(0.8, 0.1, 100)], delta=1e-5, accountant="rdp") == pytest.approx(12.36, abs=0.01)
    assert epsilon([Spending(0.8, 0.1, 100)], delta=1e-5, accountant="prv") == pytest.approx(10.99, abs=0.01)


@pytest.mark.parametrize("one", [Spending(1000.0, 0.001, 1), Spending(0.01, 1.0, 100), Spending(0.5, 0.5, 1000)])
def test_hardly_any_noise_and_hardly_any_loss_have_a_finite_epsilon(one: Spending) -> None:
    found = epsilon([one], delta=1e-4, accountant="prv")
    assert 0.0 <= found <= epsilon([one], delta=1e-4, accountant="rdp")
    assert math.isfinite(found)


def test_nothing_spent_is_nothing() -> None:
    for accountant in ("prv", "rdp"):
        assert epsilon([], delta=1e-5, accountant=accountant) == 0.0
        assert epsilon([Spending(1.0, 0.1, 0)], delta=1e-5, accountant=accountant) == 0.0
        assert epsilon([Spending(200.0, 1.0, 1)], delta=0.04, accountant=accountant) == 0.0  # delta covers it alone


@settings(max_examples=25, deadline=None)
@given(
    sigma=st.floats(0.7, 20.0),
    rate=st.floats(0.01, 1.0),
    steps=st.integers(1, 200),
    cut=st.floats(0.0, 1.0),
)
def test_order_and_cuts_of_a_history_do_not_matter_and_more_costs_more(sigma: float, rate: float, steps: int, cut: float) -> None:
    first = int(cut * steps)
    other = Spending(2.0 * sigma, rate, 7)
    parts = [Spending(sigma, rate, first), other, Spending(sigma, rate, steps - first)]
    whole = epsilon([Spending(sigma, rate, steps), other], delta=1e-4, accountant="rdp")
    assert epsilon(parts, delta=1e-4, accountant="rdp") == whole
    assert epsilon([Spending(sigma, rate, steps)], delta=1e-4, accountant="rdp") <= whole
    assert epsilon([Spending(1.5 * sigma, rate, steps), other], delta=1e-4, accountant="rdp") <= whole


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
@pytest.mark.parametrize("target", [0.5, 3.0, 8.0])
def test_the_noise_keeps_its_target_and_hardly_more(accountant, target: float) -> None:
    besides = (Spending(10.0, 1.0, 3),) if target > 2 else ()
    setting = {"sample_rate": 0.2, "steps": 100, "delta": 1e-3}
    sigma = noise_multiplier(target, **setting, accountant=accountant, besides=besides)
    reached = epsilon([Spending(sigma, 0.2, 100), *besides], delta=1e-3, accountant=accountant)
    assert 0.98 * target <= reached <= target


def test_a_target_that_no_noise_keeps_is_refused() -> None:
    with pytest.raises(IcmoeError) as caught:
        noise_multiplier(1.0, sample_rate=0.2, steps=10, delta=1e-3, accountant="rdp", besides=[Spending(0.5, 1.0, 5)])
    assert caught.value.faults[0].number == 403


def test_a_study_spends_its_target_over_all_its_rounds(make_study) -> None:
    study = make_study(privacy={"site": SITE}, rounds=4)
    assert 2.9 <= study_epsilon(study) <= 3.0
    one = training_spending(study.privacy.site, rounds=4)
    assert study_spending(study) == (Spending(one.noise_multiplier, 0.2, 40),)
    assert study_epsilon(make_study()) == math.inf


def test_noised_scores_come_out_of_the_same_target(make_study) -> None:
    withheld = make_study(privacy={"site": SITE}, rounds=4)
    noised = make_study(privacy={"site": {**SITE, "scores": "noised"}}, rounds=4)
    assert score_spending(withheld.privacy.site) == ()
    assert study_spending(noised)[1:] == (Spending(10.0, 1.0, 1),) * 5
    assert study_epsilon(noised) <= 3.0
    assert study_spending(noised)[0].noise_multiplier > study_spending(withheld)[0].noise_multiplier


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"epsilon": 0.0}, "privacy.site.epsilon = 0.0 (allowed: greater than 0)"),
        ({"epsilon": -1.0}, "privacy.site.epsilon = -1.0 (allowed: greater than 0)"),
        ({"delta": 0.011}, "delta at most 1 / patients = 0.01"),
        ({"noise_multiplier": 1.0}, "either epsilon or noise_multiplier"),
        ({"epsilon": None}, "either epsilon or noise_multiplier"),
        ({"sample_rate": 0.001}, "sample_rate * patients at least 1, not 0.1"),
        ({"sample_rate": 1.1}, "privacy.site.sample_rate = 1.1 (allowed: less than or equal to 1)"),
        ({"clip_norm": 0.0}, "privacy.site.clip_norm = 0.0"),
        ({"accountant": "gdp"}, "privacy.site.accountant = 'gdp'"),
        ({"unit": "slice"}, "privacy.site.unit = 'slice'"),
    ],
)
def test_a_promise_that_is_none_is_refused(make_study, change, said: str) -> None:
    with pytest.raises(IcmoeError) as caught:
        make_study(privacy={"site": {**SITE, **change}})
    (fault,) = caught.value.faults
    assert fault.number == 202
    assert said in str(fault)


def test_a_promise_may_reach_its_limits(make_study) -> None:
    limits = make_study(privacy={"site": {**SITE, "patients": 128, "delta": 1 / 128, "sample_rate": 1 / 128}}).privacy.site
    assert limits.expected_batch == 1.0


def test_privacy_enters_the_digest_and_its_absence_does_not(make_study) -> None:
    assert make_study(privacy={}).digest == make_study().digest
    assert len({make_study(privacy={"site": {**SITE, "steps": steps}}).digest for steps in (1, 2)} | {make_study().digest}) == 3

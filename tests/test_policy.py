"""A site's policy at its limits: what is just allowed, and what is one step beyond."""

from __future__ import annotations

import math

import pytest
from books import PRIVACY

from fl_client.policy import Policy, policy_faults
from icmoe.accounting import study_epsilon
from icmoe.study import Study


def said(policy: Policy, study: Study) -> list[tuple[str, str]]:
    return [(fault.what.partition(": ")[2], fault.value) for fault in policy_faults(policy, study)]


@pytest.mark.parametrize(("quorum", "refused"), [(3, []), (2, [("quorum is below the site's", "2")])])
def test_the_smallest_quorum_is_enough(quorum: int, refused: list[tuple[str, str]], make_study) -> None:
    assert said(Policy(min_quorum=3), make_study(quorum=quorum)) == refused


def test_a_study_may_spend_exactly_the_largest_epsilon(make_study) -> None:
    study = make_study(privacy={"site": PRIVACY})
    epsilon = study_epsilon(study)
    assert said(Policy(max_epsilon=epsilon), study) == []
    assert said(Policy(max_epsilon=math.nextafter(epsilon, 0.0)), study) == [("epsilon is above the site's", f"{epsilon:.3g}")]


def test_each_label_of_a_study_must_be_allowed_but_its_background(make_study) -> None:
    named = [{"name": name, "values": [value]} for value, name in enumerate(["nothing", "lesion", "vessel", "kidney"])]
    study = make_study(labels=named)
    assert said(Policy(labels=("lesion", "vessel", "kidney")), study) == []
    assert said(Policy(labels=("lesion",)), study) == [("label is not allowed", "vessel, kidney")]


def test_noise_at_the_coordinator_is_no_privacy_at_the_site(make_study) -> None:
    """The coordinator sees the updates before they get its noise."""
    plain = {"cap": 1.0, "min_contributors": 1, "shrinkage": False, "balance_step": 0.0}
    server = {"noise_multiplier": 1.0, "delta": 0.01, "sites": 3, "divisor": 1.0}
    study = make_study(aggregation=plain, privacy={"server": server})
    assert said(Policy(require_dp=True), study) == [("study has no differential privacy", "none")]
    assert said(Policy(require_dp=True), make_study(privacy={"site": PRIVACY})) == []

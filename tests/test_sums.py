"""The sums form of router-aware FedAvg: from the sum of the sites' vectors alone, beside the plain form."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_server.app import make_strategy, start_state
from fl_server.replies import Update
from fl_server.roster import Roster
from fl_server.round_strategy import Tensors, record_of
from fl_server.router_aware import RouterAware
from fl_server.sums import FromSums
from icmoe.errors import IcmoeError
from icmoe.kinds import BALANCE_BIAS, expert_of, is_personal, is_usage_weighted
from icmoe.study import Study
from icmoe.sums import SumLayout, own_vector, own_weights, unpacked

SITES = {node: f"site{node}" for node in range(1, 7)}


@st.composite
def equal_settings(draw) -> dict[str, Any]:
    """Settings under which both forms are equal, as the docstring of icmoe.sums derives them."""
    exponent = draw(st.sampled_from([0.0, 0.5, 1.0, 2.0]))
    known = exponent == 1.0
    return {
        "usage_exponent": exponent,
        "floor": 0.0 if exponent else draw(st.floats(0.0, 0.9)),
        "cap": 1.0,
        "starved": "keep",
        "min_contributors": draw(st.integers(1, 3)),
        "shrinkage": known and draw(st.booleans()),
        "balance_step": draw(st.sampled_from([0.0, 0.05])) if known else 0.0,
    }


@st.composite
def rounds(draw) -> list[tuple[int, list[float]]]:
    """Sizes and usages of some sites; usages may be exactly zero."""
    row = st.lists(st.sampled_from([0.0, 0.01, 0.2, 1.0, 3.0]), min_size=3, max_size=3).filter(lambda u: sum(u) > 0)
    rows = draw(st.lists(st.tuples(st.integers(1, 500), row), min_size=1, max_size=6))
    return [(size, [u / sum(usage) for u in usage]) for size, usage in rows]


def updates_of(study: Study, rows: list[tuple[int, list[float]]], seed: int = 0) -> list[Update]:
    rng = np.random.default_rng(seed)
    shapes = {
        name: tensor.shape
        for name, tensor in start_state(study).arrays.items()
        if name != BALANCE_BIAS and not (study.aggregation.personal and is_personal(name, study.model))
    }
    return [
        Update(
            site=SITES[node],
            size=size,
            usage_M=tuple(usage),
            loss=0.5,
            steps=1,
            train_s=0.1,
            size_bytes=1,
            tensors={name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()},
        )
        for node, (size, usage) in enumerate(rows, start=1)
    ]


def moved(form: type[RouterAware], study: Study, updates: list[Update]) -> Tensors:
    strategy = form(study, SITES)
    strategy.configure_train(1, record_of(start_state(study).arrays), ConfigRecord(), None)
    return strategy._moved(updates)


@given(changes=equal_settings(), rows=rounds(), personal=st.booleans(), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_where_the_docstring_says_so_both_forms_are_equal(
    changes: dict[str, Any], rows: list[tuple[int, list[float]]], personal: bool, seed: int, make_study
) -> None:
    plain = make_study(aggregation={**changes, "personal": personal})
    sums = make_study(aggregation={**changes, "personal": personal, "form": "sums", "largest_size": 500})
    updates = updates_of(plain, rows, seed)
    wanted, found = moved(RouterAware, plain, updates), moved(FromSums, sums, updates)
    assert wanted.keys() == found.keys()
    for name, tensor in wanted.items():
        np.testing.assert_allclose(found[name], tensor, rtol=1e-5, atol=1e-6, err_msg=name)
        assert found[name].dtype == np.float32


def test_the_vector_is_what_the_design_says(make_study) -> None:
    study = make_study(aggregation={"form": "sums", "cap": 1.0, "starved": "keep", "floor": 0.1, "largest_size": 200})
    update = updates_of(study, [(50, [0.6, 0.39, 0.01])])[0]
    layout = SumLayout({name: tensor.shape for name, tensor in update.tensors.items()}, study.model)
    vector = own_vector(layout, update.tensors, 50, np.array(update.usage_M), study.aggregation)
    w_M = 0.25 * (0.9 * np.array(update.usage_M) + 0.1 / 3)
    np.testing.assert_allclose(vector[layout.tensor_values :], [*w_M, 0.25, 1.0, 1.0, 0.0], rtol=1e-6)
    assert len(vector) == layout.length == layout.tensor_values + 7
    sums = unpacked(layout, vector)
    for name, tensor in update.tensors.items():
        weight = w_M[expert_of(name)] if is_usage_weighted(name, study.model) else 0.25
        np.testing.assert_allclose(sums.tensors[name], weight * tensor, rtol=1e-5)
    np.testing.assert_allclose(sums.mean_usage(study.aggregation), update.usage_M, atol=1e-6)


def test_a_site_above_n_max_counts_as_n_max(make_study) -> None:
    settings_ = make_study(aggregation={"largest_size": 100}).aggregation
    usage_M = np.array([0.2, 0.3, 0.5])
    np.testing.assert_array_equal(own_weights(5000, usage_M, settings_), own_weights(100, usage_M, settings_))
    assert own_weights(5000, usage_M, settings_).max() <= 1.0


@pytest.mark.parametrize("changes", [{}, {"cap": 1.0}, {"cap": 1.0, "starved": "keep", "usage_exponent": 2.0}])
def test_a_study_that_asks_of_sums_what_they_do_not_tell_is_refused(changes: dict[str, Any], make_study) -> None:
    with pytest.raises(IcmoeError) as caught:
        make_study(aggregation={"form": "sums", **changes})
    assert caught.value.faults[0].number == 202
    assert "sums" in str(caught.value)


def test_the_study_chooses_the_form(make_study) -> None:
    roster = Roster(SITES, dict.fromkeys(SITES.values(), 10))
    study = make_study(aggregation={"form": "sums", "cap": 1.0, "starved": "keep"})
    assert isinstance(make_strategy(study, roster).inner, FromSums)
    assert not isinstance(make_strategy(make_study(), roster).inner, FromSums)


def test_an_expert_that_nobody_used_has_no_less_than_no_usage(make_study) -> None:
    settings, experts = make_study(aggregation={"floor": 0.1, "largest_size": 30}).aggregation, make_study().model
    layout, usage_M = SumLayout({}, experts), np.array([0.0, 0.0, 1.0])
    for size in range(1, 31):  # the sum is rounded to float32, downwards for some of them
        mean_M = unpacked(layout, own_vector(layout, {}, size, usage_M, settings)).mean_usage(settings)
        assert mean_M == pytest.approx(usage_M, abs=1e-6)
        assert mean_M.min() >= 0.0


def test_usage_at_the_threshold_is_no_contribution_in_the_sums_either(make_study) -> None:
    study = make_study()
    least, layout = study.aggregation.min_usage, SumLayout({}, study.model)
    usage_M = np.array([least, np.nextafter(least, 1.0), 1.0 - 2.0 * least])
    assert unpacked(layout, own_vector(layout, {}, 10, usage_M, study.aggregation)).contributors_M.tolist() == [0, 1, 1]

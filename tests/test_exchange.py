"""What leaves a site: which tensors, in which form, and that nothing half-valid comes in."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from icmoe.errors import IcmoeError
from icmoe.exchange import announced_size, global_state, load_state, state_digest, state_faults, update_of
from icmoe.kinds import BALANCE_BIAS, expert_of, is_personal, is_usage_weighted
from icmoe.model import build_model


def moved(model: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter += 0.01 * (index + 1)
    return model


def test_an_update_is_what_training_changed(make_study) -> None:
    study = make_study()
    model = build_model(study, seed=1)
    start = global_state(model)
    update = update_of(moved(model), start, personal=False, shape=study.model)
    assert set(update) == set(start) - {BALANCE_BIAS}
    after = global_state(model)
    for name, delta in update.items():
        assert torch.equal(delta, after[name] - start[name])
        assert delta.abs().sum() > 0


def test_personal_parts_stay(make_study) -> None:
    study = make_study(model={"basic_experts": 1, "semantic_experts": 1, "adaptive_experts": 2})
    model = build_model(study, seed=1)
    start = global_state(model)
    everything = set(update_of(model, start, personal=False, shape=study.model))
    stays = everything - set(update_of(model, start, personal=True, shape=study.model))
    assert stays == {name for name in everything if name.startswith(("router.", "experts.2.", "experts.3."))}
    assert len(stays) > 3


def test_each_tensor_belongs_to_one_part(make_study) -> None:
    shape = make_study().model
    assert [expert_of(name) for name in ("experts.0.up.weight", "experts.12.x", "head.experts.1.w", "router.1.w")] == [
        0,
        12,
        None,
        None,
    ]
    assert [is_usage_weighted(f"experts.{index}.w", shape) for index in range(3)] == [False, True, True]
    assert [is_personal(f"experts.{index}.w", shape) for index in range(3)] == [False, False, True]
    assert is_personal("router.conv.weight", shape)
    assert not is_usage_weighted("router.conv.weight", shape)


def test_a_refused_state_leaves_the_model_untouched_and_names_every_fault(make_study) -> None:
    model = build_model(make_study(), seed=1)
    before = state_digest(global_state(model))
    bad = global_state(moved(build_model(make_study(), seed=2)))
    names = sorted(bad)
    bad[names[0]] = torch.full_like(bad[names[0]], torch.inf)
    bad[names[1]] = torch.zeros(1, 1, 1)
    bad["stranger"] = bad.pop(names[2])
    with pytest.raises(IcmoeError) as caught:
        load_state(model, bad)
    assert {fault.where for fault in caught.value.faults} == {*names[:3], "stranger"}
    assert {fault.number for fault in caught.value.faults} == {301}
    assert state_digest(global_state(model)) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_a_value_is_finite_whether_or_not_its_square_is(dtype: torch.dtype) -> None:
    held = {"a": torch.zeros(3, dtype=dtype)}
    largest = torch.finfo(dtype).max if dtype.is_floating_point else torch.iinfo(dtype).max
    assert state_faults(held, {"a": torch.full((3,), largest, dtype=dtype)}) == []
    for wrong in (math.nan, math.inf, -math.inf) if dtype.is_floating_point else ():
        (fault,) = state_faults(held, {"a": torch.tensor([0.0, wrong, largest], dtype=dtype)})
        assert fault.what == "tensor holds NaN or infinity"


def test_the_digest_sees_names_shapes_types_and_values() -> None:
    base = {"a": torch.zeros(2, 3), "b": torch.ones(2)}
    others = [
        {"a": torch.zeros(3, 2), "b": torch.ones(2)},
        {"a": torch.zeros(2, 3), "c": torch.ones(2)},
        {"a": torch.zeros(2, 3), "b": torch.ones(2, dtype=torch.float16)},
        {"a": torch.zeros(2, 3), "b": torch.tensor([1.0, 2.0])},
    ]
    assert state_digest(dict(reversed(base.items()))) == state_digest(base)
    assert len({state_digest(state) for state in [base, *others]}) == 5


@given(st.integers(1, 10**6))
def test_a_size_is_sent_rounded_up_to_ten(slices: int) -> None:
    sent = announced_size(slices, exact=False)
    assert sent % 10 == 0
    assert 0 <= sent - slices < 10
    assert announced_size(slices, exact=True) == slices

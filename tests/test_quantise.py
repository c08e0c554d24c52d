"""Updates in int8: what rounding does to a tensor, and that nothing it leaves out is lost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fl_client.egress import rounded_to
from fl_client.owed import owed_path, quantised_update
from icmoe.errors import IcmoeError
from icmoe.quantise import (
    EXPONENT,
    HIGHEST_EXPONENT,
    LARGEST,
    LOWEST_EXPONENT,
    MANTISSA_BITS,
    Dequantised,
    dequantised,
    out_of_range,
    quantised,
    rows_of,
    sent_shapes,
)
from icmoe.tensor_file import read_tensors

SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)
ANY = st.floats(min_value=-(2.0**126), max_value=2.0**126, width=32)
"""Everything that an update may hold and more: subnormal numbers, zeros of both signs, far beyond every bound."""


@given(tensor=hnp.arrays(np.float32, SHAPES, elements=ANY))
@settings(max_examples=300)
def test_a_value_comes_back_within_half_a_step_of_its_row(tensor: np.ndarray) -> None:
    steps, exponent_R = quantised(tensor)
    back = dequantised(steps, exponent_R)
    assert (steps.dtype, exponent_R.dtype, back.dtype) == (np.int8, np.int8, np.float32)
    assert (steps.shape, exponent_R.shape, back.shape) == (tensor.shape, (rows_of(tensor.shape),), tensor.shape)
    assert not out_of_range("x", steps)
    assert not out_of_range("x" + EXPONENT, exponent_R)
    rows = len(exponent_R)
    error_RN = np.abs(tensor.astype(np.float64) - back.astype(np.float64)).reshape(rows, -1 if tensor.size else 0)
    step_R = np.ldexp(1.0, exponent_R.astype(int))
    assert (error_RN <= step_R[:, None] / 2).all()
    largest_R = np.abs(steps.astype(int)).reshape(rows, -1 if tensor.size else 0).max(axis=1, initial=0)
    assert ((largest_R >= 64) | (exponent_R == LOWEST_EXPONENT)).all()  # a smaller step would not reach the largest value


@given(tensor=hnp.arrays(np.float32, SHAPES, elements=ANY))
def test_what_was_rounded_once_is_rounded_to_itself(tensor: np.ndarray) -> None:
    back = dequantised(*quantised(tensor))
    again = dequantised(*quantised(back))
    assert np.array_equal(back, again)
    assert np.array_equal(back.astype(np.float64) + (tensor - back).astype(np.float64), tensor)  # the rest is exact


def test_rows_have_steps_of_their_own_and_a_vector_has_one() -> None:
    tensor = np.array([[1.0, 0.5], [1e-6, -1e-6]], dtype=np.float32)
    steps, exponent_R = quantised(tensor)
    assert steps.tolist() == [[64, 32], [67, -67]]
    assert exponent_R.tolist() == [-6, -26]
    assert quantised(tensor[0])[1].shape == quantised(np.float32(0.3) * np.ones((), np.float32))[1].shape == (1,)


@pytest.mark.parametrize(
    ("value", "step", "exponent"),
    [(127.0, 127, 0), (127.4, 127, 0), (127.5, 64, 1), (128.0, 64, 1), (63.9, 64, 0), (63.7, 127, -1), (0.0, 0, LOWEST_EXPONENT)],
)
def test_the_step_is_the_least_that_reaches_the_largest_value(value: float, step: int, exponent: int) -> None:
    steps, exponents = quantised(np.array([value, -value], dtype=np.float32))
    assert (steps.tolist(), exponents.tolist()) == ([step, -step], [exponent])


def test_what_no_row_reaches_is_cut_off_and_keeps_its_sign() -> None:
    steps, exponents = quantised(np.array([3e38, -3e38, 2.0**120], dtype=np.float32))
    assert (steps.tolist(), exponents.tolist()) == ([LARGEST, -LARGEST, 1], [HIGHEST_EXPONENT])


def test_an_update_is_read_one_tensor_at_a_time() -> None:
    rng = np.random.default_rng(1)
    update = {name: rng.normal(size=shape).astype(np.float32) for name, shape in (("a", (3, 4)), ("b", (5,)))}
    sent = {}
    for name, tensor in update.items():
        sent[name], sent[name + EXPONENT] = quantised(tensor)
    assert {name: array.shape for name, array in sent.items()} == sent_shapes({name: one.shape for name, one in update.items()})
    found = Dequantised(sent)
    assert (sorted(found), len(found)) == (["a", "b"], 2)
    assert found["a"] is not found["a"]
    assert all(np.array_equal(found[name], dequantised(sent[name], sent[name + EXPONENT])) for name in update)


def test_what_no_update_holds_is_counted() -> None:
    assert out_of_range("w", np.array([-128, -127, 127], dtype=np.int8)) == 1
    ends = np.array([LOWEST_EXPONENT - 1, LOWEST_EXPONENT, HIGHEST_EXPONENT, HIGHEST_EXPONENT + 1], dtype=np.int8)
    assert out_of_range("w" + EXPONENT, ends) == 2
    assert math.isfinite(float(np.float32(LARGEST) * np.ldexp(np.float32(1.0), HIGHEST_EXPONENT)))


def rounds_of(seed: int, rounds: int) -> list[dict[str, torch.Tensor]]:
    """Updates whose sums float32 holds exactly, of sizes that differ from row to row and round to round."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(rounds):
        size_R = 10.0 ** rng.integers(0, 5, (6, 1))
        whole = {"w": rng.normal(size=(6, 7)) * size_R, "b": rng.normal(size=4) * 100, "z": np.zeros((2, 2))}
        found.append({name: torch.from_numpy((np.rint(one) / 2.0**20).astype(np.float32)) for name, one in whole.items()})
    return found


def sent_by(updates: list[dict[str, torch.Tensor]], folder: Path, study, bits: int = 23) -> list[Mapping[str, np.ndarray]]:
    found = []
    for number, update in enumerate(updates, start=1):
        sent = quantised_update(update, folder, study, "Alder", number, bits=bits)
        found.append(Dequantised({name: one.numpy() for name, one in sent.items()}))
    return found


@given(seed=st.integers(0, 2**32), rounds=st.integers(1, 6), bits=st.sampled_from([4, 5, 6, 10, 23]))
@settings(max_examples=40)
def test_all_that_was_trained_is_sent_but_for_the_last_remainder(make_study, seed: int, rounds: int, bits: int) -> None:
    study, updates = make_study(update={"form": "int8"}), rounds_of(seed, rounds)
    with TemporaryDirectory() as folder:
        sent = sent_by(updates, Path(folder), study, bits)
        left, _ = read_tensors(owed_path(Path(folder), study, "Alder", rounds))
    for name in updates[0]:
        trained = sum(update[name].double() for update in updates)
        assert torch.equal(sum(torch.from_numpy(one[name]).double() for one in sent), trained - left[name].double())


@given(seed=st.integers(0, 2**32), bits=st.integers(4, 23))
@settings(max_examples=60)
def test_no_more_bits_leave_than_the_site_allows(make_study, seed: int, bits: int) -> None:
    study = make_study(update={"form": "int8"})
    with TemporaryDirectory() as folder:
        for update in sent_by(rounds_of(seed, 3), Path(folder), study, bits):
            for tensor in update.values():
                values = torch.from_numpy(tensor)
                assert torch.equal(rounded_to(values, min(bits, MANTISSA_BITS)), values)


def test_without_feedback_small_changes_are_never_sent_and_with_it_they_are(make_study, tmp_path: Path) -> None:
    """One value of a row is a hundred times as large as the other, which stays below half a step in every round."""
    study = make_study(update={"form": "int8"})
    update = {"w": torch.tensor([[1.0, 0.003]])}
    sent = sent_by([update] * 20, tmp_path, study)
    assert dequantised(*quantised(update["w"].numpy()))[0, 1] == 0.0
    assert sum(float(one["w"][0, 1]) for one in sent) == pytest.approx(20 * 0.003, abs=2.0**-7)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_refused_and_leaves_nothing_behind(value: float, make_study, tmp_path: Path) -> None:
    study = make_study(update={"form": "int8"})
    with pytest.raises(IcmoeError, match="ICM304 w: update holds NaN or infinity"):
        quantised_update({"w": torch.tensor([[1.0, value]])}, tmp_path, study, "Alder", 1, bits=23)
    assert list(tmp_path.rglob("owed-*")) == []

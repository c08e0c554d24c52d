"""The coordinator's sum of updates: in pieces, some updates at once, the same bits as the plain sum."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
from flwr.app import Array, ArrayRecord
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_server.replies import PIECE, InReply
from fl_server.router_aware import AT_ONCE, add, together
from icmoe.packing import PACKED


@given(st.integers(1, 3 * PIECE), st.integers(0, 4), st.booleans(), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_a_sum_is_the_same_in_pieces_and_in_its_own_place(size: int, count: int, in_place: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tensor, *deltas = rng.standard_normal((count + 1, size), dtype=np.float32)
    weights = rng.random(count, dtype=np.float32)
    wanted, kept = tensor.copy(), tensor.copy()
    for weight, delta in zip(weights, deltas, strict=True):
        wanted += weight * delta
    found = tensor if in_place else np.full_like(tensor, np.nan)
    add(tensor, list(zip(weights, deltas, strict=True)), found)
    assert np.array_equal(found, wanted)
    assert in_place or np.array_equal(tensor, kept)


@given(st.lists(st.booleans(), max_size=60))
def test_updates_that_are_views_are_added_some_at_once_and_copies_one_by_one(views: list[bool]) -> None:
    whole, packed = (ArrayRecord({name: Array(np.zeros(2, np.float32))}) for name in ("a", PACKED))
    updates = [SimpleNamespace(tensors=InReply(whole if view else packed, {"a": (2,)}, "float32")) for view in views]
    groups = list(together(updates))  # type: ignore[arg-type]
    assert [index for group in groups for index in group] == list(range(len(views)))
    assert all(0 < len(group) <= AT_ONCE for group in groups)
    assert all(len(group) == 1 or all(views[index] for index in group) for group in groups)
    full = [len(one) == AT_ONCE or not (views[one[0]] and views[other[0]]) for one, other in itertools.pairwise(groups)]
    assert all(full), "none is added by itself where it could go with its neighbours"

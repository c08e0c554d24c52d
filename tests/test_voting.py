"""Pixel-probability adaptive voting against a slow reading of its formulas, pixel by pixel."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from icmoe.voting import agreement, disagreement, top_k_gates, vote


def drawn(seed: int, experts: int, classes: int = 3, side: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, experts, side, side, generator=generator)
    votes = torch.randn(2, experts, classes, side, side, generator=generator).softmax(dim=2)
    return logits, votes, torch.randn(experts, generator=generator) * 0.3


def slow_vote(s: list[float], v: list[list[float]], bias: list[float], top_k: int, beta: float) -> list[float]:
    total = sum(math.exp(value) for value in s)
    r = [math.exp(value) / total for value in s]
    consensus = [sum(r[e] * v[e][c] for e in range(len(s))) for c in range(len(v[0]))]
    a = [math.log(r[e]) + beta * sum(consensus[c] * v[e][c] for c in range(len(consensus))) + bias[e] for e in range(len(s))]
    chosen = sorted(range(len(s)), key=lambda e: -a[e])[:top_k]
    weight = sum(math.exp(a[e]) for e in chosen)
    return [math.exp(a[e]) / weight if e in chosen else 0.0 for e in range(len(s))]


@given(seed=st.integers(0, 10_000), experts=st.integers(1, 6), top_k=st.integers(1, 6), beta=st.floats(0.0, 5.0))
def test_gates_follow_the_formula_at_every_pixel(seed: int, experts: int, top_k: int, beta: float) -> None:
    logits, votes, bias = drawn(seed, experts, side=2)
    top_k = min(top_k, experts)
    gates = vote(logits, votes, bias, top_k=top_k, consensus=beta)
    for b, h, w in [(0, 0, 0), (0, 1, 0), (1, 0, 1), (1, 1, 1)]:
        expected = slow_vote(logits[b, :, h, w].tolist(), votes[b, :, :, h, w].tolist(), bias.tolist(), top_k, beta)
        assert gates[b, :, h, w].tolist() == pytest.approx(expected, abs=1e-5)


@given(seed=st.integers(0, 10_000), experts=st.integers(1, 8), top_k=st.integers(1, 8))
def test_gates_lie_on_the_simplex_with_exactly_top_k_open(seed: int, experts: int, top_k: int) -> None:
    logits, _, _ = drawn(seed, experts)
    gates = top_k_gates(logits, min(top_k, experts))
    assert (gates >= 0).all()
    assert torch.allclose(gates.sum(dim=1), torch.ones_like(gates[:, 0]))
    assert ((gates > 0).sum(dim=1) == min(top_k, experts)).all()


@given(seed=st.integers(0, 10_000), order=st.permutations(range(4)))
def test_permuting_the_experts_permutes_the_gates(seed: int, order: list[int]) -> None:
    logits, votes, bias = drawn(seed, 4)
    gates = vote(logits, votes, bias, top_k=2, consensus=2.0)
    permuted = vote(logits[:, order], votes[:, order], bias[order], top_k=2, consensus=2.0)
    assert torch.allclose(permuted, gates[:, order], atol=1e-6)


def test_an_expert_that_agrees_with_the_consensus_gains() -> None:
    logits = torch.zeros(1, 3, 1, 1)
    votes = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.1, 0.9]]).view(1, 3, 2, 1, 1)
    k = agreement(logits, votes)[0, :, 0, 0]
    assert k[0] == k[1] > k[2]
    gates = vote(logits, votes, torch.zeros(3), top_k=3, consensus=2.0)[0, :, 0, 0]
    assert gates[0] > 1 / 3 > gates[2]
    plain = vote(logits, votes, torch.zeros(3), top_k=3, consensus=0.0)
    assert torch.allclose(plain, torch.full_like(plain, 1 / 3))


def test_the_balance_bias_selects_the_neglected_expert() -> None:
    logits, votes, _ = drawn(1, 3)
    bias = torch.tensor([0.0, 0.0, 50.0])
    assert (vote(logits, votes, bias, top_k=1, consensus=2.0)[:, 2] == 1).all()


@given(seed=st.integers(0, 10**6), experts=st.integers(1, 5), classes=st.integers(2, 5))
def test_disagreement_is_a_share_and_nothing_where_all_experts_vote_alike(seed: int, experts: int, classes: int) -> None:
    logits, votes, _ = drawn(seed, experts, classes)
    gates = logits.softmax(dim=1)
    found = disagreement(votes, gates)
    assert found.shape == gates[:, 0].shape
    assert 0.0 <= float(found.min()) <= float(found.max()) <= 1.0
    alike = votes[:, :1].expand_as(votes)
    assert 0.0 <= float(disagreement(alike, gates).min()) <= float(disagreement(alike, gates).max()) < 1e-5


@pytest.mark.parametrize(("gates", "want"), [((0.5, 0.5), 1.0), ((1.0, 0.0), 0.0), ((0.75, 0.25), 0.8113)])
def test_two_sure_experts_that_oppose_each_other_disagree_by_the_entropy_of_their_gates(
    gates: tuple[float, float], want: float
) -> None:
    votes = torch.eye(2)[None, :, :, None, None]
    found = disagreement(votes, torch.tensor(gates)[None, :, None, None])
    assert float(found) == pytest.approx(want, abs=1e-4)


def test_disagreement_is_measured_against_the_number_of_classes_not_of_experts() -> None:
    votes = torch.eye(4)[None, :3, :, None, None]  # three sure experts, each for another of four classes
    found = disagreement(votes, torch.full((1, 3, 1, 1), 1 / 3))
    assert float(found) == pytest.approx(math.log(3) / math.log(4), abs=1e-5)


def test_gates_teach_the_router_and_the_votes_through_every_term() -> None:
    logits, votes, bias = (tensor.double().requires_grad_() for tensor in drawn(2, 3, side=1))
    assert torch.autograd.gradcheck(lambda *given: vote(*given, top_k=3, consensus=2.0), (logits, votes, bias))

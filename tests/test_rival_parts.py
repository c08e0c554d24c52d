"""Pieces of the rivals by themselves: decoder, adapters, averages, the front of the plot."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_rivals import backbone, study
from torch import nn

from simulations.evidence.rivals.averaging import adaptive_step, weighted_mean
from simulations.evidence.rivals.bench import _begin
from simulations.evidence.rivals.encoder_adapters import AfterAttention, BesidePerceptron
from simulations.evidence.rivals.pareto import front
from simulations.evidence.rivals.sam_decoder import SamDecoder
from simulations.evidence.rivals.table import Row

__all__ = ["backbone", "study"]
numbers = st.floats(-1e3, 1e3, width=32)


def test_the_decoder_gives_for_a_batch_what_the_published_class_gives_image_by_image() -> None:
    torch.manual_seed(0)
    decoder = SamDecoder(3, 8, None, whole=False).eval()
    embedding_BCHW = torch.randn(2, 256, 8, 8)
    batch = decoder(SimpleNamespace(embedding_BCHW=embedding_BCHW))
    dense = decoder.no_mask_1C[..., None, None].expand(1, -1, 8, 8)
    for row, logits in zip(embedding_BCHW, batch, strict=True):
        single, _ = decoder.sam.predict_masks(row[None], decoder.positions_1CHW, torch.empty(1, 0, 256), dense)
        torch.testing.assert_close(single[0], logits, rtol=1e-4, atol=1e-5)


@given(st.dictionaries(st.sampled_from("abcd"), st.tuples(st.integers(1, 500), numbers), min_size=1))
def test_the_average_weighs_sites_by_their_slices_and_stays_among_them(sites: dict[str, tuple[int, float]]) -> None:
    mean = weighted_mean({k: {"w": torch.tensor([x])} for k, (_, x) in sites.items()}, {k: n for k, (n, _) in sites.items()})
    values = [x for _, x in sites.values()]
    expected = sum(n * x for n, x in sites.values()) / sum(n for n, _ in sites.values())
    assert mean["w"].item() == pytest.approx(expected, rel=1e-4, abs=1e-2)
    assert min(values) - 1e-2 <= mean["w"].item() <= max(values) + 1e-2


@pytest.mark.parametrize("kind", ["adam", "yogi"])
def test_adaptive_steps_are_those_of_flower(kind: str) -> None:
    from flwr.app import Array, ArrayRecord

    from fl_server.aggregate import flower_reply
    from fl_server.server_optimizer import FLOWER_STRATEGIES

    flower = FLOWER_STRATEGIES[kind](eta=0.01, tau=1e-3)
    generator, state, moments = torch.Generator().manual_seed(0), {"w": torch.randn(7)}, {}
    for round_number in (1, 2, 3):
        mean = {"w": state["w"] + 0.1 * torch.randn(7, generator=generator)}
        flower.current_arrays = {"w": state["w"].numpy()}
        theirs, _ = flower.aggregate_train(
            round_number, [flower_reply(ArrayRecord({"w": Array(mean["w"].numpy())}), "num-examples", 1)]
        )
        state, moments = adaptive_step(kind, state, mean, moments, rate=0.01, round_number=round_number)
        torch.testing.assert_close(state["w"], torch.tensor(theirs["w"].numpy()).float(), rtol=1e-5, atol=1e-6)


def test_a_process_of_a_job_can_take_adaptive_steps() -> None:
    """Flower's own processes are told who they are before they may make messages, and so are those of these tests."""
    state = {"w": torch.ones(2)}
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_begin, initargs=(os.getpid(),)) as pool:
        step = partial(adaptive_step, "adam", state, {"w": torch.zeros(2)}, {}, rate=0.01, round_number=1)
        after, _ = pool.submit(step).result(timeout=120)
    assert (after["w"] < state["w"]).all()


@given(st.lists(st.tuples(st.integers(1, 9), st.floats(0, 1), st.booleans()), min_size=1))
def test_nobody_on_the_front_is_beaten_at_its_cost(points: list[tuple[int, float, bool]]) -> None:
    rows = [Row(title="", regime="", parameters=size, mean=dice, short=short) for size, dice, short in points]
    line = front(rows)
    full = [(size, dice) for size, dice, short in points if not short]
    assert set(line) <= set(full)
    for size, dice in full:
        assert max(best for cost, best in line if cost <= size) >= dice
    assert line == sorted(line)
    assert len({dice for _, dice in line}) == len(line)


def test_adapters_add_the_whole_behind_attention_and_half_beside_the_perceptron() -> None:
    x_BLC = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(0))
    behind, beside = AfterAttention(nn.Identity(), 8), BesidePerceptron(nn.Identity(), 8)
    for module in (behind, beside):
        nn.init.ones_(module.adapter.up.weight)
    torch.testing.assert_close(behind(x_BLC), x_BLC + behind.adapter(x_BLC))
    torch.testing.assert_close(beside(x_BLC), x_BLC + 0.5 * beside.adapter(x_BLC))

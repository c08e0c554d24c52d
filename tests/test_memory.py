"""Memory does not grow by what a round brings: a strategy that kept one update per round would be noticed."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterable

import numpy as np
import pytest
from flwr.app import ArrayRecord, Message, MetricRecord

from fl_server.wrapping import Wrapping
from simulations.benchmarks.memory import at_coordinator, at_site, slope_of, update_bytes

ROUNDS, WARM_UP = 40, 10


class Leaking(Wrapping):
    """Keep one update of each round."""

    kept: list[Message]

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        answers = list(replies)
        self.kept = [*getattr(self, "kept", []), answers[0]]
        return super().aggregate_train(server_round, answers)


@pytest.fixture(autouse=True)
def _traced() -> Iterable[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


def test_the_coordinator_keeps_far_less_of_a_round_than_an_update() -> None:
    """One of its four sites is always silent; the record of the rounds, which it keeps on purpose, is in it."""
    found = slope_of(at_coordinator(ROUNDS).traced, WARM_UP)
    assert found.high < 0.25 * update_bytes()


def test_a_strategy_that_keeps_an_update_per_round_is_noticed() -> None:
    found = slope_of(at_coordinator(ROUNDS, around=Leaking).traced, WARM_UP)
    assert found.low > 0.75 * update_bytes()


def test_the_code_of_a_site_keeps_far_less_of_a_round_than_an_update() -> None:
    """What Python and NumPy hold. A hospital's process ends with each message; that of a simulation goes on."""
    assert slope_of(at_site(ROUNDS).traced, WARM_UP).high < 0.25 * update_bytes()


def test_the_slope_is_that_of_a_line_and_its_interval_holds_it() -> None:
    rng = np.random.default_rng(0)
    level = [10**6 + int(rng.normal(0, 1000)) for _ in range(200)]
    rising = [value + 70 * number for number, value in enumerate(level)]
    flat, slope = slope_of(level, 40), slope_of(rising, 40)
    assert flat.low < 0.0 < flat.high
    assert slope.low < 70.0 < slope.high
    assert slope.low > 0.0

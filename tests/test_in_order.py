"""Calls of another thread: in order, a bounded number ahead, faults told."""

from __future__ import annotations

import threading
from functools import partial

import pytest

from icmoe.in_order import InOrder

DEADLINE_S = 10.0


def test_results_come_in_order_and_may_be_asked_again() -> None:
    with InOrder("squares", (partial(pow, base, 2) for base in range(5)), 2) as squares:
        assert squares.first(2) == squares.first(2) == [0, 1]
        squares.drop()
        assert squares.first(3) == [1, 4, 9]  # more than are held ahead
        for _ in range(3):
            squares.drop()
        assert squares.first(3) == [16]


def test_no_more_calls_are_begun_than_may_be_held() -> None:
    begun: list[int] = []
    with InOrder("numbers", (partial(begun.append, number) for number in range(9)), 3) as numbers:
        numbers.first(3)
        assert begun == [0, 1, 2]
        numbers.drop()
        numbers.first(3)
        assert begun == [0, 1, 2, 3]


def test_who_adds_waits_for_room() -> None:
    gate, done = threading.Event(), []

    def slow(number: int) -> None:
        assert gate.wait(DEADLINE_S)
        done.append(number)

    with InOrder[None]("slow", (), 2) as slowly:
        slowly.add(partial(slow, 0))
        slowly.add(partial(slow, 1))
        adding = threading.Thread(target=lambda: slowly.add(partial(slow, 2)))
        adding.start()
        adding.join(0.05)
        assert adding.is_alive()
        gate.set()
        adding.join(DEADLINE_S)
        assert not adding.is_alive()
        slowly.drain()
    assert done == [0, 1, 2]


@pytest.mark.parametrize("how", ["first", "add", "drain"])
def test_a_fault_of_a_call_is_raised_where_its_result_is_asked(how: str) -> None:
    def fails() -> int:
        raise OSError("full")

    with InOrder("fails", [fails], 1) as calls:
        asked = {"first": partial(calls.first, 1), "add": partial(calls.add, lambda: 1), "drain": calls.drain}[how]
        with pytest.raises(OSError, match="full"):
            asked()

"""Calls made by one other thread, in order, a bounded number of them ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


class InOrder(Generic[T]):
    """A thread that makes calls in order, and their results; a context manager that waits for the calls which it has begun.

    Parameters
    ----------
    name
        Of the thread.
    calls
        Made as there is room; more are added one by one.
    most
        Calls whose results are held or not there yet, at least 1.
    """

    def __init__(self, name: str, calls: Iterable[Callable[[], T]], most: int) -> None:
        self._calls, self._most = iter(calls), most
        self._pending: deque[Future[T]] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)

    def __enter__(self) -> InOrder[T]:
        self._fill(self._most)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._thread.shutdown(cancel_futures=True)

    def first(self, count: int) -> list[T]:
        """Return the results of the first calls that were not dropped, fewer where there are no more; may be asked again.

        Raises
        ------
        Exception
            What the call raised.
        """
        self._fill(max(count, self._most))
        return [call.result() for call in islice(self._pending, count)]

    def drop(self) -> None:
        """Give up the first result; the thread goes on with the next call."""
        self._pending.popleft()
        self._fill(self._most)

    def take(self) -> T:
        """Return the first result and give it up; the thread goes on with the next call.

        Raises
        ------
        Exception
            What the call raised.
        """
        call = self._pending.popleft()
        self._fill(self._most)
        return call.result()

    def add(self, call: Callable[[], T]) -> None:
        """Make one more call, after waiting for room.

        Raises
        ------
        Exception
            What an earlier call raised.
        """
        while len(self._pending) >= self._most:
            self._pending.popleft().result()
        self._pending.append(self._thread.submit(call))

    def drain(self) -> None:
        """Wait for all calls.

        Raises
        ------
        Exception
            What the first that failed raised.
        """
        while self._pending:
            self._pending.popleft().result()

    def _fill(self, most: int) -> None:
        room = most - len(self._pending)
        self._pending.extend(self._thread.submit(call) for call in islice(self._calls, max(0, room)))

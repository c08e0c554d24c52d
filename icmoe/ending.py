"""How a command ends that is told to by a signal: as after any other fault, so that what is half made goes with it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

ENDS = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
"""What ends a process at once unless it says otherwise; an interrupt from the terminal is an exception already."""


class Ended(SystemExit):
    """A signal asked this process to end.

    Parameters
    ----------
    number
        Of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


@contextmanager
def answered(
    signals: Iterable[signal.Signals], answer: Callable[[int, FrameType | None], object] | signal.Handlers
) -> Iterator[None]:
    """Let `answer` take these signals meanwhile; afterwards they are what they were. For the main thread alone.

    Yields
    ------
    None
    """
    before = {number: signal.signal(number, answer) for number in signals}
    try:
        yield
    finally:
        for number, action in before.items():
            signal.signal(number, action)


@contextmanager
def unwinding() -> Iterator[None]:
    """Let a signal end the process by an exception, and in the end by itself: whoever sent it sees that it did.

    One that is ignored, as under nohup, stays so. What a library makes of the exception, as pydantic does while it writes a
    record, is no fault of its own. An interrupt stays Python's: libraries look for its own way of taking it.

    Yields
    ------
    None
    """
    if threading.current_thread() is not threading.main_thread():  # where no signal arrives
        yield
        return
    asked: list[int] = []

    def end(number: int, frame: FrameType | None) -> None:
        del frame
        asked.append(number)
        raise Ended(number)

    taken = [number for number in ENDS if signal.getsignal(number) is signal.SIG_DFL]
    with answered(taken, end):
        try:
            yield
        except BaseException:
            for sent in asked[:1]:
                signal.signal(sent, signal.SIG_DFL)
                os.kill(os.getpid(), sent)
            raise


@contextmanager
def undisturbed() -> Iterator[None]:
    """Ignore signals that would end the process: what is half made is being removed, and a second one must not stop that.

    Yields
    ------
    None
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with answered((*ENDS, signal.SIGINT), signal.SIG_IGN):
        yield

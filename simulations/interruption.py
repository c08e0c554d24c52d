"""The end of a command that was interrupted: what is kept, how to go on, and nothing that runs on."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from icmoe.ending import answered
from icmoe.errors import Fault, print_faults

INTERRUPTED = 130
"""Exit code, as of a shell whose command was interrupted."""


@contextmanager
def exit_on_interruption(todo: str) -> Iterator[None]:
    """Turn Ctrl-C and SIGTERM into one line and the exit code of an interruption.

    Parameters
    ----------
    todo
        How to go on.

    Yields
    ------
    None
    """
    with answered((signal.SIGINT, signal.SIGTERM), _interrupt):
        try:
            yield
        except KeyboardInterrupt:
            _end(todo)
        except SystemExit as end:
            if end.code == signal.SIGTERM:  # as Ray has it while it starts
                _end(todo)
            raise


def _interrupt(number: int, frame: object) -> NoReturn:
    """Raise a KeyboardInterrupt; what libraries then log is of processes that end with this one."""
    del number, frame
    logging.disable(logging.CRITICAL)
    raise KeyboardInterrupt


def _end(todo: str) -> NoReturn:
    """Say how to go on and end at once: threads of Flower's engine wait for actors that are gone, for ever."""
    for again in (signal.SIGINT, signal.SIGTERM):  # from whoever cannot wait; this takes no longer
        signal.signal(again, signal.SIG_IGN)
    with suppress(OSError):  # the terminal may be gone
        print_faults([Fault(number=503, what="interrupted", did="Finished rounds are kept.", todo=todo)])
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(INTERRUPTED)

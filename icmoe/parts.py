"""The same work in smaller parts where memory does not suffice."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

log = logging.getLogger(__name__)

T = TypeVar("T")

# PyTorch's allocator for the CPU has no exception of its own: `DefaultCPUAllocator: can't allocate memory: you tried ...`.
_CPU_ALLOCATOR = "DefaultCPUAllocator"


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception says that the device or the machine has no memory left."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and _CPU_ALLOCATOR in str(error)
    )


class Parts:
    """How many slices are worked on at once: half as many after each lack of memory, down to one.

    Parameters
    ----------
    at_once
        To begin with, at least 1.
    """

    def __init__(self, at_once: int) -> None:
        self.at_once = at_once

    def run(self, attempt: Callable[[int], T]) -> T:
        """Return what `attempt` returns when told how many slices to take at once.

        Parameters
        ----------
        attempt
            Must begin anew each time that it is called.

        Raises
        ------
        Exception
            What `attempt` raised, where it is no lack of memory or one slice alone is too much.
        """
        while True:
            try:
                return attempt(self.at_once)
            except Exception as error:
                if self.at_once == 1 or not is_out_of_memory(error):
                    raise
            # After the handler: the exception's frames hold the tensors of the attempt.
            log.warning("memory did not suffice for %d slices at once; going on with half as many", self.at_once)
            self.at_once = (self.at_once + 1) // 2
            torch.cuda.empty_cache()

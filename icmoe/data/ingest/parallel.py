"""Several processes that may die: a decoder that crashes on one file costs that file, not the run."""

from __future__ import annotations

import ctypes
import gc
import importlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from typing import Self, TypeVar

Item = TypeVar("Item")
Answer = TypeVar("Answer")

PRELOADED = "icmoe.data.ingest.preloaded"
"""Imported once, by the process that all workers are forked from."""
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Options of the GNU C library's mallopt."""
KEPT_BYTES = 2**26
"""Memory up to which a worker reuses what it freed."""


class Workers:
    """Processes that serve one step after another, with what they imported for the first.

    Parameters
    ----------
    processes
        0 is one per core.
    """

    def __init__(self, processes: int) -> None:
        self._processes = processes or os.cpu_count() or 1
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def start(self) -> ProcessPoolExecutor:
        """Return the processes, started where they are not there."""
        if self._pool is None:
            self._pool = _pool(self._processes)
        return self._pool

    def lose(self, *, waiting: bool) -> None:
        """Give the processes up, killed where they still are at work; others start when they are needed."""
        if self._pool is not None:
            _kill(self._pool, waiting=waiting)
            self._pool = None


def in_processes(
    function: Callable[[Item], Answer], items: Iterable[Item], workers: Workers, *, deadline_s: float
) -> Iterator[tuple[Item, Answer | None]]:
    """Yield each item with its answer as it comes, or with None where the process that worked on it died or hung.

    Parameters
    ----------
    function
        Picklable, and so are items and answers.
    items
        Made as they are needed.
    workers
        Who work on them; not started where there is no item.
    deadline_s
        Seconds without any answer after which the items at work count as hung.
    """
    unsure: list[Item] = []
    waiting = iter(items)
    while first := list(islice(waiting, 1)):
        yield from _drain(workers, function, chain(first, waiting), unsure, deadline_s)
        for item in unsure:
            with Workers(1) as single:
                job = single.start().submit(function, item)
                answer = None
                if wait([job], timeout=deadline_s).done and job.exception() is None:
                    answer = job.result()
                else:
                    single.lose(waiting=job.done())
            yield item, answer
        unsure.clear()


def _drain(
    workers: Workers,
    function: Callable[[Item], Answer],
    waiting: Iterator[Item],
    unsure: list[Item],
    deadline_s: float,
) -> Iterator[tuple[Item, Answer | None]]:
    """Yield answers until all are there or the processes are lost; what was at work then is in `unsure`.

    Whatever `function` raises costs its item alone; only what the disk refuses would meet every other item too.
    """
    jobs: dict[Future[Answer], Item] = {}
    try:
        while True:
            for item in islice(waiting, 4 * (os.cpu_count() or 1) - len(jobs)):
                unsure.append(item)  # until it is submitted
                jobs[workers.start().submit(function, item)] = item
                unsure.pop()
            if not jobs:
                break
            done = wait(jobs, timeout=deadline_s, return_when="FIRST_COMPLETED").done
            if not done:
                workers.lose(waiting=False)
                break
            for job in done:
                error = job.exception()
                if isinstance(error, BrokenProcessPool | OSError):
                    raise error
                yield jobs.pop(job), None if error else job.result()
    except BrokenProcessPool:
        workers.lose(waiting=True)
    unsure += jobs.values()


def _pool(processes: int) -> ProcessPoolExecutor:
    """Return running processes, forked from this one where no other thread of it could hold a lock meanwhile.

    Elsewhere they are forked from a process without threads, which has to import first what this one mostly has.
    """
    alone = threading.active_count() == 1
    context = multiprocessing.get_context("fork" if alone else "forkserver")
    if alone:
        importlib.import_module(PRELOADED)
    else:
        context.set_forkserver_preload([PRELOADED])
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_begin)
    pool.submit(os.getpid)  # they start with their first task
    return pool


def _begin() -> None:
    """Make a worker end by signals as if it had no others' handlers, and when its parent is killed.

    It would wait for ever on a queue that itself holds open.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    gc.freeze()  # what is there stays, and looking through it again and again takes time
    _keep_memory()

    def watch() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _keep_memory() -> None:
    """Let the C library reuse the memory of a frame for the next one instead of asking the kernel for other, cleared pages.

    A frame of 512 x 512 pixels needs 560 of them, a quarter of the time of counting its values. Other C libraries lack this.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, KEPT_BYTES)
        mallopt(TRIM_THRESHOLD, KEPT_BYTES)


def _kill(pool: ProcessPoolExecutor, *, waiting: bool) -> None:
    for process in list((pool._processes or {}).values()):
        process.kill()
    pool.shutdown(wait=waiting, cancel_futures=True)

"""Several processes that may die: a decoder that crashes on one file costs that file, not the run."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from multiprocessing import forkserver
from typing import TypeVar

Item = TypeVar("Item")
Answer = TypeVar("Answer")

PRELOAD = ["icmoe.data.ingest.preloaded"]
"""Imported once, by the process that all workers are forked from."""


def in_processes(
    function: Callable[[Item], Answer], items: Iterable[Item], processes: int, *, deadline_s: float
) -> Iterator[tuple[Item, Answer | None]]:
    """Yield each item with its answer as it comes, or with None where the process that worked on it died or hung.

    Parameters
    ----------
    function
        Picklable, and so are items and answers.
    items
        Made as they are needed.
    processes
        0 is one per core.
    deadline_s
        Seconds without any answer after which the items at work count as hung.
    """
    unsure: list[Item] = []
    waiting = iter(items)
    first = list(islice(waiting, 1))
    if not first:
        return
    waiting = chain(first, waiting)
    with _pool(processes or os.cpu_count() or 1) as pool:
        yield from _drain(pool, function, waiting, unsure, deadline_s)
    for item in chain(unsure, waiting):
        with _pool(1) as pool:
            job = pool.submit(function, item)
            answer = None
            if wait([job], timeout=deadline_s).done and job.exception() is None:
                answer = job.result()
            else:
                _kill(pool)
            yield item, answer


def _drain(
    pool: ProcessPoolExecutor,
    function: Callable[[Item], Answer],
    waiting: Iterator[Item],
    unsure: list[Item],
    deadline_s: float,
) -> Iterator[tuple[Item, Answer | None]]:
    """Yield answers until all are there or the pool is lost; what was at work then is in `unsure`.

    Whatever `function` raises costs its item alone; only what the disk refuses would meet every other item too.
    """
    jobs: dict[Future[Answer], Item] = {}
    try:
        while True:
            for item in islice(waiting, 4 * (os.cpu_count() or 1) - len(jobs)):
                unsure.append(item)  # until it is submitted
                jobs[pool.submit(function, item)] = item
                unsure.pop()
            if not jobs:
                break
            done = wait(jobs, timeout=deadline_s, return_when="FIRST_COMPLETED").done
            if not done:
                _kill(pool)
                break
            for job in done:
                error = job.exception()
                if isinstance(error, BrokenProcessPool | OSError):
                    raise error
                yield jobs.pop(job), None if error else job.result()
    except BrokenProcessPool:
        pass
    unsure += jobs.values()


def preload() -> None:
    """Start the process that workers are forked from; it imports what they need while this one goes on."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOAD)
    forkserver.ensure_running()


def _pool(processes: int) -> ProcessPoolExecutor:
    preload()
    context = multiprocessing.get_context("forkserver")
    return ProcessPoolExecutor(processes, mp_context=context, initializer=_end_with_parent)


def _end_with_parent() -> None:
    """Make a worker end when its parent is killed: it would wait for ever on a queue that itself holds open."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _kill(pool: ProcessPoolExecutor) -> None:
    for process in list((pool._processes or {}).values()):
        process.kill()
    pool.shutdown(wait=False, cancel_futures=True)

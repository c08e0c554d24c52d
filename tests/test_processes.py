"""What every long-lived process does for its memory, and how it is asked to end."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from pathlib import Path

from fresh import printed

from icmoe.processes import asked_to_stop, free_port


def collected(*, swept: bool) -> bool:
    script = (
        "import gc, weakref\n"
        "from icmoe.processes import sweep_often\n"
        "class Node: pass\n"
        "old = [[] for _ in range(300_000)]\n"
        "gc.collect()\n"
        f"{'sweep_often()' if swept else ''}\n"
        "one, other = Node(), Node()\n"
        "one.other, other.one, gone = other, one, weakref.ref(one)\n"
        "gc.collect(1)\n"
        "del one, other\n"
        "for _ in range(200):\n"
        "    kept = [[] for _ in range(900)]\n"
        "print(gone() is None)\n"
    )
    return printed(script) == "True"


def test_old_garbage_of_a_large_process_is_found_soon():
    assert [collected(swept=False), collected(swept=True)] == [False, True]


def test_a_request_to_end_is_heard_wherever_the_process_is():
    # Heard by a lock, this storm stops the process for good within a second.
    script = (
        "import signal, time\n"
        "from icmoe.processes import asked_to_stop\n"
        "times, ends = 0, time.monotonic() + 3\n"
        "with asked_to_stop(signal.SIGALRM) as stop:\n"
        "    signal.setitimer(signal.ITIMER_REAL, 2e-3, 2e-3)\n"
        "    while time.monotonic() < ends or times <= 100:\n"  # a busy machine takes longer
        "        times, stop.asked = times + stop.wait(0), False\n"
        "    signal.setitimer(signal.ITIMER_REAL, 0)\n"
        "print(times > 100)\n"
    )
    assert printed(script) == "True"


def test_a_wait_ends_when_asked_and_the_signals_are_what_they_were_afterwards():
    before = signal.getsignal(signal.SIGUSR1)
    with asked_to_stop(signal.SIGUSR1) as stop:
        began = time.monotonic()
        assert not stop.wait(0.05)
        assert time.monotonic() - began >= 0.05
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        assert stop.wait(60)
        assert time.monotonic() - began < 30
        assert stop.wait(60), "at once from now on"
    assert signal.getsignal(signal.SIGUSR1) == before


def test_a_free_port_is_none_that_an_outgoing_connection_takes_before_it_is_bound() -> None:
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    found = {free_port() for _ in range(20)}
    assert len(found) > 10
    assert not found & set(range(first, last + 1))
    with socket.create_server(("127.0.0.1", found.pop())):
        pass

"""What every long-lived process does for its memory."""

from __future__ import annotations

from fresh import printed


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

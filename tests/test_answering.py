"""An answer whose parts never come ends the SuperNode, which is started again; a slow coordinator ends nothing."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest
from test_supervisor import ENV, within

from fl_client.answering import Answer
from fl_client.watchdog import CONNECTION_ENDED

# Flower's own loop with its own stores, up to the moment at which the ClientApp is killed: its answer is announced, and no
# part of it arrives. Only the talk with the coordinator is replaced.
STUCK = """
import contextlib, sys, time
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, iterate_object_tree
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode import start_client_internal as flower
from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState
from fl_client import callbacks
TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 7, 5, 1
callbacks.PART_S = 2.0
store = InMemoryObjectStore()
state = InMemoryNodeState(store)
asked = Message(RecordDict(), dst_node_id=5, message_type="train")
asked.metadata.__dict__["_message_id"] = "a" * 64
answer = Message(RecordDict({"c": ConfigRecord({"a": 1})}), reply_to=asked)
answer.metadata.__dict__["_message_id"] = answer.object_id
session = state.start_session(7)
ok, missing = state.store_message_and_object_tree(answer, get_object_tree(answer), session)
assert ok and missing
if sys.argv[1] == "whole":
    for name, part in get_all_nested_objects(answer).items():
        store.put(name, part.deflate())

@contextlib.contextmanager
def connect():
    send = lambda message, tree, seconds: ({part.object_id for part in iterate_object_tree(tree)}, "session")
    yield (5, lambda: None, send, None, None, None, lambda *_: None, None)

with callbacks.watched(connect)() as (_, receive, send, _, _, _, push, _):
    flower._push_messages(state=state, object_store=store, send=send, push_object=push)
    receive()
    time.sleep(4)
print("answered")
"""


def run_flower(how: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", STUCK, how], env=ENV, capture_output=True, text=True, timeout=60)


def test_a_part_that_never_comes_ends_the_process_that_waits_for_it() -> None:
    done = run_flower("announced")
    assert done.returncode == CONNECTION_ENDED
    assert "ICM323 a part of the answer was announced and never came (allowed: 2 s). The SuperNode ends here." in done.stderr


def test_an_answer_that_is_whole_is_sent_and_nothing_ends_afterwards() -> None:
    done = run_flower("whole")
    assert (done.returncode, done.stdout) == (0, "answered\n"), done.stderr


@pytest.fixture
def ended() -> threading.Event:
    return threading.Event()


def watch(ended: threading.Event) -> Answer:
    return Answer(ended.set, part_s=0.3, look_s=0.02)


def test_before_an_answer_and_after_it_any_time_may_pass(ended: threading.Event) -> None:
    answer = watch(ended)
    assert not ended.wait(0.6)
    assert answer.begun(lambda: "wanted")() == "wanted"
    answer.over(lambda: None)()
    assert not ended.wait(0.6)


def test_the_coordinator_may_take_any_time_for_a_part(ended: threading.Event) -> None:
    answer = watch(ended)
    answer.begun(time.sleep)(0.6)
    answer.part(time.sleep)(0.6)
    assert not ended.is_set()
    assert within(5, ended.is_set)


def test_parts_that_keep_coming_keep_it_going(ended: threading.Event) -> None:
    answer = watch(ended)
    answer.begun(lambda: None)()
    for _ in range(10):
        time.sleep(0.1)
        answer.part(lambda: None)()
    assert not ended.is_set()


def test_a_part_of_an_answer_that_was_given_up_counts_for_nothing(ended: threading.Event) -> None:
    answer = watch(ended)
    answer.begun(lambda: None)()
    late = threading.Thread(target=answer.part(time.sleep), args=(0.2,))
    late.start()
    answer.over(lambda: None)()
    late.join()
    assert not ended.wait(0.6)


def test_a_part_that_fails_fails_as_it_did(ended: threading.Event) -> None:
    answer = watch(ended)

    def refuse() -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        answer.part(refuse)()
    assert answer.calls == 0

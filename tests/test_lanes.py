"""Many virtual sites on few nodes: each site gets its own message and its own answer, and large answers wait on disk."""

from __future__ import annotations

import pickle
import resource
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fl_server.app import start_state
from fl_server.roster import online
from fl_server.round_strategy import record_of
from icmoe.errors import IcmoeError
from icmoe.kinds import BALANCE_BIAS
from icmoe.packing import bytes_of, unpack
from simulations import in_store
from simulations.benchmarks.no_training import sites_of, study_of, train_nothing
from simulations.federation import SitesOnDisk, write_sites
from simulations.lanes import PARTITION, AnySite, Lanes
from simulations.on_disk import SMALL_BYTES, OnDisk, to_disk

SITES, NODES = 7, [101, 102]


@pytest.fixture(autouse=True)
def task(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Flower sets in the processes that it starts."""
    for name in ("run_id", "task_id", "node_id"):
        monkeypatch.setattr(TaskIdentity, f"_{name}", 1)


class Slow:
    """Flower's Grid as far as it is used, with nodes that answer, the last one first, when they are told to."""

    def __init__(self) -> None:
        self.under_way: dict[str, Message] = {}
        self.most = 0

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        numbers = []
        for message in messages:
            assert message.metadata.dst_node_id not in {one.metadata.dst_node_id for one in self.under_way.values()}
            numbers.append(f"inner-{message.metadata.group_id}")
            message.metadata.__dict__["_message_id"] = numbers[-1]
            self.under_way[numbers[-1]] = message
        self.most = max(self.most, len(self.under_way))
        return numbers

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        assert set(message_ids) == set(self.under_way)
        _, message = self.under_way.popitem()
        return [large_answer(int(message.metadata.group_id), message)]


class Leaving(Slow):
    """The same where each node leaves its large arrays in a folder, and its answer comes from another process."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        (answer,) = super().pull_messages(message_ids)
        to_disk(answer, self.folder)
        travelling = pickle.dumps(answer)
        assert len(travelling) < SMALL_BYTES
        return [pickle.loads(travelling)]


def large_answer(site: int, asked: Message) -> Message:
    arrays = ArrayRecord({"large": Array(np.full(SMALL_BYTES, site, dtype=np.uint8)), "small": Array(np.array([site]))})
    return Message(RecordDict({"update": arrays}), reply_to=asked)


def answers(lanes: Lanes, asked: list[Message]) -> dict[str, Message]:
    found: dict[str, Message] = {}
    waiting = set(lanes.push_messages(asked))
    assert waiting == {message.metadata.message_id for message in asked}
    while waiting:
        for reply in lanes.pull_messages(waiting):
            waiting.remove(reply.metadata.reply_to_message_id)
            found[reply.metadata.reply_to_message_id] = reply
    return found


def test_every_site_answers_its_own_message_and_no_more_are_under_way_than_there_are_nodes(tmp_path: Path) -> None:
    grid = Slow()
    lanes = Lanes(grid, NODES, SITES, tmp_path)  # type: ignore[arg-type]
    assert list(online(lanes)) == list(lanes.get_node_ids()) == list(range(1, SITES + 1))
    content = RecordDict({"config": ConfigRecord({"study": "x"})})
    for _ in range(2):  # a node is free again after its answer
        asked = [Message(content, dst_node_id=node, message_type="train") for node in lanes.get_node_ids()]
        found = answers(lanes, asked)
        assert grid.most == len(NODES)
        for message in asked:
            reply = found[message.metadata.message_id]
            assert reply.metadata.src_node_id == message.metadata.dst_node_id
            assert reply.content["update"]["small"].numpy().tolist() == [message.metadata.dst_node_id - 1]


@pytest.mark.parametrize("left_by_the_node", [False, True])
def test_large_tensors_wait_in_files_that_go_with_the_reply(tmp_path: Path, left_by_the_node: bool) -> None:
    lanes = Lanes(Leaving(tmp_path) if left_by_the_node else Slow(), NODES, 3, tmp_path)  # type: ignore[arg-type]
    found = answers(lanes, [Message(RecordDict(), dst_node_id=node, message_type="train") for node in (1, 2, 3)])
    assert len(list(tmp_path.iterdir())) == 3
    kept = [reply.content["update"]["large"] for reply in found.values()]
    assert all(isinstance(array, OnDisk) and "data" not in vars(array) for array in kept)
    assert sorted(int(array.numpy()[0]) for array in kept) == [0, 1, 2]
    assert all(array.numpy().shape == (SMALL_BYTES,) for array in kept)
    found.clear()
    kept.clear()
    assert list(tmp_path.iterdir()) == []


@contextmanager
def no_room() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_without_room_for_answers_is_named_and_nothing_stays_on_it(tmp_path: Path) -> None:
    asked = Message(RecordDict(), dst_node_id=1, message_type="train")
    with no_room(), pytest.raises(OSError, match=str(tmp_path)):
        to_disk(large_answer(1, asked), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_site_leaves_its_update_on_disk_and_sends_it_where_there_is_no_room(tmp_path: Path) -> None:
    study, replies = study_of(2), tmp_path / "replies"
    write_sites(tmp_path / "sites.json", sites_of(1, study, tmp_path))
    app = AnySite(SitesOnDisk(tmp_path / "sites.json"), {"train": train_nothing}, replies)
    content = RecordDict({"arrays": record_of(start_state(study).arrays), "config": ConfigRecord()})
    content["config"]["study"], content["config"]["server-round"] = study.digest, 1
    context = Context(run_id=1, node_id=5, node_config={}, state=RecordDict(), run_config={})

    def update() -> Array:
        answer = app(Message(content, dst_node_id=101, message_type="train", group_id="0"), context)
        (array,) = answer.content["update"].values()
        return array

    left = update()
    assert isinstance(left, OnDisk)
    (file,) = replies.iterdir()
    assert file.read_bytes() == left.data
    file.unlink()
    with no_room():
        sent = update()
    assert not isinstance(sent, OnDisk)
    assert sent.data == bytes_of(sent.numpy())
    assert unpack(sent.numpy()).keys() == start_state(study).arrays.keys() - {BALANCE_BIAS}
    assert list(replies.iterdir()) == []


def test_large_tensors_are_put_into_rays_store_once_for_all_sites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored: list[np.ndarray] = []
    monkeypatch.setattr("ray.put", lambda value: stored.append(value) or len(stored) - 1)
    monkeypatch.setattr("ray.get", lambda where: stored[where])
    tensors = {"large": np.arange(in_store.SMALL_BYTES, dtype=np.float32), "small": np.arange(3, dtype=np.float32)}
    content = RecordDict({"model": ArrayRecord({name: Array(tensor) for name, tensor in tensors.items()})})
    grid = Slow()
    lanes = Lanes(grid, NODES, SITES, tmp_path)  # type: ignore[arg-type]
    lanes.push_messages([Message(content, dst_node_id=node, message_type="train") for node in lanes.get_node_ids()])
    for _ in range(SITES):
        for message in grid.under_way.values():
            sent = message.content["model"]
            assert [isinstance(sent[name], in_store.InStore) for name in ("large", "small")] == [True, False]
            travelled = pickle.loads(pickle.dumps(sent["large"]))
            np.testing.assert_array_equal(travelled.numpy(), tensors["large"])
        lanes.pull_messages([])
    assert len(stored) == 1


def who(context: Context, digest: str) -> None:
    raise IcmoeError(*[])  # never reached: the site is looked up before anything is answered


def test_the_app_travels_as_what_it_was_made_of_and_is_the_site_that_is_asked(tmp_path: Path) -> None:
    app = pickle.loads(pickle.dumps(AnySite(who, None, tmp_path)))
    context = Context(run_id=1, node_id=5, node_config={}, state=RecordDict(), run_config={})
    message = Message(RecordDict(), dst_node_id=101, message_type="train", group_id="4")
    assert app(message, context).has_error()  # it carries no study
    assert context.node_config[PARTITION] == 4

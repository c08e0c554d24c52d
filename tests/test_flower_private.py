"""The one module that touches Flower's private names: they are there, and what crosses them is what the site decided."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import io
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import Error, Message, RecordDict
from flwr.cli.build import build_fab_from_disk
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.run import Run
from flwr.supernode import start_client_internal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fl_client import flower_private
from fl_client.flower_private import LARGEST_BYTES, SOON_S, guarded, pack, unpack
from icmoe.bundle import bundle_files
from icmoe.errors import CATALOGUE, IcmoeError

FILES = {"pyproject.toml": b"[project]\nname = 'x'\n", "fl_client/app.py": b"app = 1\n"}


def zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


MINE = Fab(hashlib.sha256(zipped(FILES)).hexdigest(), zipped(FILES), {})


def question() -> Message:
    return Message(RecordDict(), dst_node_id=5, message_type="train")


class Wire:
    """The coordinator behind Flower's callbacks: ships what it likes, keeps what it gets."""

    def __init__(self, shipped: bytes) -> None:
        self.shipped = shipped
        self.sent: list[tuple[Message, Any]] = []
        self.seconds: list[float] = []
        self.pushed: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.waiting: list[str] = []
        self.looks = 0

    def receive(self) -> str | None:
        self.looks += 1
        return self.waiting.pop(0) if self.waiting else None

    @contextmanager
    def connect(self, *arguments: object) -> Iterator[tuple[Any, ...]]:
        assert arguments == ("coordinator:443",)
        yield (5, self.receive, self.send, self.get_run, self.get_fab, "pull", self.push, "confirm")

    def get_run(self, run_id: int) -> Run:
        run = Run.create_empty(run_id)
        run.fab_id, run.fab_version, run.fab_hash = "evil/../../app", "9", "f" * 64
        run.override_config, run.primary_task_type = {"study": "/etc/passwd"}, TaskType.AGENT_APP
        return run

    def get_fab(self, fab_hash: str, run_id: int) -> Fab:
        self.asked.append(fab_hash)
        return Fab(MINE.hash_str, self.shipped, {"valid_license": "yes", "fpk_evil": "{}"})

    def send(self, message: Message, tree: Any, runtime_s: float) -> tuple[set[str], str]:
        self.sent.append((message, tree))
        self.seconds.append(runtime_s)
        return {tree.object_id}, "session"

    def push(self, run_id: int, session: str, object_id: str, content: bytes) -> None:
        assert session == "session"
        self.pushed[object_id] = content


def through(wire: Wire) -> Any:
    return guarded(wire.connect, MINE, "icmoe/icmoe-federated", "0.1.0")("coordinator:443")


def verdict(shipped: bytes) -> tuple[bool, Fab, Run, Wire]:
    wire = Wire(shipped)
    with through(wire) as (_, _, _, get_run, get_fab, *_):
        run = get_run(7)
        fab = get_fab(run.fab_hash, 7)
    return flower_private._verdict(fab, {}), fab, run, wire


def test_the_private_names_are_there_and_flower_calls_them_as_we_expect() -> None:
    source = inspect.getsource(start_client_internal)
    assert "with http_request_response(" in source
    assert "fab_verified = _verify_fab(fab, trusted_entities)" in source
    assert 'fab.verifications.get("valid_license", "")' in source


def test_another_version_of_flower_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("icmoe.platform.version", lambda _: "1.42.0")
    with pytest.raises(IcmoeError, match=r"ICM303 flwr: .*1\.42\.0 \(allowed: 1\.41\.x\)"):
        importlib.reload(flower_private)


def test_two_builds_and_flowers_own_command_agree(tmp_path: Path) -> None:
    files = bundle_files()
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert pack(files) == pack(dict(reversed(files.items()))) == build_fab_from_disk(tmp_path)
    assert set(unpack(pack(files))) == {*files, ".info/CONTENT"}
    assert len(pack(files)) < 1_000_000


def test_equal_files_run_as_the_sites_own_bytes_under_the_sites_own_names() -> None:
    packed_otherwise = zipped(dict(reversed(FILES.items())))
    assert packed_otherwise != MINE.content
    runs, fab, run, wire = verdict(packed_otherwise)
    assert runs
    assert (fab.content, fab.hash_str) == (MINE.content, MINE.hash_str)
    assert wire.asked == ["f" * 64]  # the coordinator's name of it is used to ask, for nothing else
    assert (run.fab_id, run.fab_version, run.fab_hash) == ("icmoe/icmoe-federated", "0.1.0", MINE.hash_str)
    assert run.override_config == {}
    assert run.primary_task_type == TaskType.SERVER_APP


def test_a_runs_bundle_is_fetched_once_and_each_run_is_judged_for_itself() -> None:
    wire = Wire(MINE.content)
    connect = guarded(wire.connect, MINE, "icmoe/icmoe-federated", "0.1.0")
    verdicts = []
    for run_id, shipped in ((7, MINE.content), (7, b"changed since"), (8, b"another run")):
        wire.shipped = shipped
        with connect("coordinator:443") as (_, _, _, get_run, get_fab, *_):
            fab = get_fab(get_run(run_id).fab_hash, run_id)
        assert fab.content == MINE.content  # whatever was shipped
        verdicts.append(flower_private._verdict(fab, {}))
    assert verdicts == [True, True, False]
    assert len(wire.asked) == 2


def test_a_site_looks_often_for_the_next_question_after_an_answer_only(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, wire = [0.0], Wire(MINE.content)

    def sleep(seconds: float) -> None:
        clock[0] += seconds
        if clock[0] >= 7.0 and not wire.waiting:
            wire.waiting.append("question")

    monkeypatch.setattr(flower_private, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=sleep))
    with through(wire) as (_, receive, send, *_):
        assert (receive(), wire.looks) == (None, 1)  # before any answer: once, and Flower waits its three seconds
        send(question(), SimpleNamespace(object_id="reply"), 0.1)
        assert (receive(), clock[0]) == ("question", 7.0)
        assert wire.looks == 1 + 1 + 14
        clock[0] = SOON_S + 1.0
        wire.waiting.clear()
        assert (receive(), wire.looks) == (None, 17)


HARMS = {
    "a changed file": {**FILES, "fl_client/app.py": b"app = 2\n"},
    "one more file": {**FILES, "torch.py": b""},
    "one file less": {"pyproject.toml": FILES["pyproject.toml"]},
    "nothing": {},
}


@pytest.mark.parametrize("harm", HARMS)
def test_other_files_never_run_and_are_named(harm: str, caplog: pytest.LogCaptureFixture) -> None:
    runs, fab, _, _ = verdict(zipped(HARMS[harm]))
    assert not runs
    assert fab.content == MINE.content
    assert "ICM317" in caplog.text


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 400), junk=st.binary(max_size=40))
def test_damaged_bundles_are_refused_and_never_crash(cut: int, junk: bytes) -> None:
    shipped = MINE.content[:cut] + junk
    runs, fab, _, _ = verdict(shipped)
    assert fab.content == MINE.content
    assert runs == (unpack(shipped) == FILES)


def test_a_bundle_that_unpacks_without_end_is_not_unpacked() -> None:
    assert unpack(zipped({"a.py": bytes(LARGEST_BYTES + 1)})) == {}


REASONS = {
    "an exception": ("<class 'ImportError'>:<'/data/Mustermann-1970.png'>", 304),
    "no text": ("", 304),
    "a number with text behind it": ("ICM302 study is not approved at this site: Mustermann-1970", 304),
    "a refused bundle": ("The FAB could not be verified.", 317),
    "a dead process": ("ClientApp stopped responding.", 323),
    "our own refusal": (f"ICM320 {CATALOGUE[320].title}", 320),
}


@pytest.mark.parametrize("name", REASONS)
def test_an_error_leaves_as_its_number_and_title_whatever_flower_wrote(name: str) -> None:
    reason, number = REASONS[name]
    reply = Message(Error(2, reason), reply_to=question())
    reply.metadata.__dict__["_message_id"] = reply.object_id
    wire = Wire(b"")
    with through(wire) as (_, _, send, *_):
        assert send(reply, "tree of the original", 1.0) == (set(), "session")
    ((message, tree),) = wire.sent
    assert message.error.reason == f"ICM{number} {CATALOGUE[number].title}"
    assert message.metadata.message_id == tree.object_id == hashlib.sha256(wire.pushed[tree.object_id]).hexdigest()
    assert b"Mustermann" not in wire.pushed[tree.object_id]
    assert reply.metadata.message_id != message.metadata.message_id  # Flower still finds the original to delete it


def test_an_answer_passes_untouched() -> None:
    reply = Message(RecordDict(), reply_to=question())
    wire = Wire(b"")

    class Tree:
        object_id = "x"

    with through(wire) as (_, _, send, *_):
        assert send(reply, Tree, 1.0) == ({"x"}, "session")
    assert wire.sent == [(reply, Tree)]


def test_no_answer_tells_how_long_it_took() -> None:
    wire, answer, refusal = Wire(b""), Message(RecordDict(), reply_to=question()), Message(Error(2, ""), reply_to=question())
    with through(wire) as (_, _, send, *_):
        send(answer, SimpleNamespace(object_id="reply"), 12.345)
        send(refusal, SimpleNamespace(object_id="reply"), 12.345)
    assert wire.seconds == [0.0, 0.0]


def test_the_entities_file_holds_one_key_that_flower_accepts(tmp_path: Path) -> None:
    from flwr.supernode.cli.flower_supernode import _try_obtain_trusted_entities, _validate_public_keys_ed25519

    entities = _try_obtain_trusted_entities(flower_private._write_entities(tmp_path / "flower"))
    assert entities is not None
    assert len(entities) == 1
    _validate_public_keys_ed25519(entities)

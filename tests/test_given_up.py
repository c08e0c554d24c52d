"""A site whose connection Flower gives up for good comes back by itself, and says what was answered."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from flwr.proto.fleet_pb2 import ActivateNodeResponse
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatResponse
from loopback import Authority, http_server
from test_supervisor import ENV, read_line, start_supervisor

from fl_client.callbacks import watched
from fl_client.credentials import make_node_key
from fl_client.flower_private import unpack
from fl_client.watchdog import CONNECTION_ENDED

pytestmark = pytest.mark.timeout(180)
PULL = "POST /v1/fleet/pull-messages "

# The site's own supervisor and SuperNode, what is said on its output.
SITE = """
import sys
from pathlib import Path
from fl_client.site import read_site_file
from fl_client.supervisor import Hearing, connection_flags, start_supernode, supervise
path = Path(sys.argv[1])
flags = connection_flags(path, read_site_file(path))
say = lambda line: print(line, flush=True)
supervise(lambda: start_supernode(path, path.parent / "state", flags), Hearing(say, lambda line: None), say)
"""


def coordinator(status: int) -> dict[str, tuple[int, bytes]]:
    """A coordinator that lets the site in, and then answers each look for a message with an error."""
    return {
        "/v1/fleet/activate-node": (200, ActivateNodeResponse(node_id=5).SerializeToString()),
        "/v1/fleet/send-node-heartbeat": (200, SendNodeHeartbeatResponse(success=True).SerializeToString()),
        "/v1/fleet/deactivate-node": (200, b""),
        "/v1/fleet/pull-messages": (status, b""),
    }


def site_at(port: int, folder: Path, authority: Authority) -> Path:
    make_node_key(folder / "node.key")
    shutil.copy(authority.path, folder / "ca.crt")
    section = {"address": f"localhost:{port}", "ca": "ca.crt", "key": "node.key"}
    lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in section.items())
    path = folder / "site.toml"
    path.write_text(f'name = "Alder"\ndata = "x"\n[coordinator]\n{lines}')
    return path


@pytest.mark.parametrize("status", [500, 404])
def test_an_answer_that_flower_does_not_try_again_costs_a_restart_and_no_more(status: int, tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ca")
    with http_server(coordinator(status), tls=authority.server("localhost")) as (port, asked):
        path = site_at(port, tmp_path, authority)
        site = subprocess.Popen([sys.executable, "-c", SITE, str(path)], stdout=subprocess.PIPE, text=True, env=ENV)
        try:
            ends = time.monotonic() + 90
            while sum(line.startswith(PULL) for line in asked) < 2 and time.monotonic() < ends:
                time.sleep(0.1)
        finally:
            site.terminate()
            said, _ = site.communicate(timeout=30)
    assert sum(line.startswith(PULL) for line in asked) >= 2, said
    told = re.findall(r"ICM324 [^\n]+", said)
    assert f"the coordinator, or a proxy before it, refused a request: HTTP {status}. The connection ends here." in told[0]
    assert "the connection was given up, for what the line above names. Starting again in" in told[1]


def test_the_supervisor_answers_the_exit_code_with_a_sentence_of_its_own() -> None:
    process = start_supervisor(f"import sys; print('born', flush=True); sys.exit({CONNECTION_ENDED})")
    try:
        said = [read_line(process) for _ in range(3)]
    finally:
        process.kill()
        process.wait(timeout=10)
    assert "ICM324 the connection was given up" in said[1]
    assert said[2] == "heard born\n"


THREADED = """
import threading, time
from fl_client.watchdog import leave
threading.Thread(target=time.sleep, args=(600,)).start()
print("said", end="")
leave({code!r})
"""


@pytest.mark.parametrize(("code", "status", "error"), [(5, 5, ""), (None, 0, ""), ("no file", 1, "no file\n")])
def test_a_process_leaves_with_its_code_and_its_words_whatever_threads_it_has(code: object, status: int, error: str) -> None:
    line = [sys.executable, "-c", THREADED.format(code=code)]
    done = subprocess.run(line, env=ENV, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (status, "said", error)


LOSSES = {
    "a proxy": (httpx.ProxyError("503 Service Unavailable"), "talk with the coordinator failed: ProxyError 503 Service"),
    "TLS cut off": (httpx.ConnectError("[SSL: UNEXPECTED_EOF_WHILE_READING] EOF"), "failed: ConnectError [SSL: UNEXPECTED_EOF"),
    "two lines": (RuntimeError("a\nICM318 b" + "c" * 1000), r"failed: RuntimeError a\nICM318 bccc"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_what_ended_the_connection_is_said_in_one_line_and_raised_as_it_was(name: str, caplog: pytest.LogCaptureFixture) -> None:
    error, sentence = LOSSES[name]

    @contextmanager
    def connect() -> Iterator[tuple[object, ...]]:
        yield (5, lambda: None, "send", "get_run", "get_fab", "pull", "push", "confirm")

    with pytest.raises(type(error)) as raised, watched(connect)():
        raise error
    assert raised.value is error
    (line,) = [record.getMessage() for record in caplog.records]
    assert sentence in line
    assert "\n" not in line
    assert len(line) < 450


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_a_bundle_that_is_damaged_inside_is_none(method: int) -> None:
    buffer, content = io.BytesIO(), bytes(range(256)) * 4
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr("a.py", content)
    for at in range(34, 60):
        damaged = bytearray(buffer.getvalue())
        damaged[at : at + 5] = b"\xff" * 5
        assert unpack(bytes(damaged)) in ({}, {"a.py": content})  # some bits of bzip2 mean nothing

"""A federation as hospitals meet it: real SuperLink, SuperExec, nginx and SuperNodes over TLS and node keys on loopback."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from consortium import (
    FL_SERVER,
    NGINX,
    certificate,
    children_of,
    environment,
    fl_server,
    flwr,
    free_port,
    listens,
    make_home,
    make_node_key,
    post,
    public_port,
    raw,
    running,
    study_text,
    supernode_command,
    wait_until,
    write_server_certificate,
)
from cryptography.hazmat.primitives.serialization import Encoding
from safetensors.numpy import load_file
from typer.testing import CliRunner

from fl_client import cli
from fl_client.site import read_site
from fl_server.home import Home
from fl_server.submit import write_app
from fl_server.superlink import nginx_configuration
from icmoe.study import Study
from simulations.phantoms import PhantomSite, write_phantoms

pytestmark = [
    pytest.mark.network,
    pytest.mark.skipif(NGINX is None and not os.environ.get("CI"), reason="nginx is not installed (apt-get install nginx)"),
]

NAMES = ("hospitalA", "hospitalB", "hospitalC")


@dataclass(frozen=True)
class Coordinator:
    """The running coordinator."""

    home: Home
    supervisor: subprocess.Popen[bytes]
    wrong_ca: Path
    expired_port: int

    @property
    def public(self) -> str:
        return self.home.address

    def site_file(self, name: str) -> Path:
        return self.home.root / "sites" / name / "site.toml"

    def node_key(self, name: str) -> Path:
        return self.home.root / "sites" / name / "node"

    def study(self, name: str) -> Path:
        return self.home.root / f"{name}.toml"


@pytest.fixture(scope="module")
def studies(make_study) -> dict[str, Study]:
    base = make_study(name="first", quorum=3, deadline_s=180.0)
    return {
        "first": base,
        "second": base.model_copy(update={"name": "second", "seed": 4, "rounds": 1}),
        "unknown": base.model_copy(update={"name": "unknown", "seed": 5}),
    }


@pytest.fixture(scope="module")
def coordinator(studies: dict[str, Study]) -> Iterator[Coordinator]:
    root = Path(tempfile.mkdtemp(prefix="icmoe-federation-"))
    root.chmod(0o755)  # nginx runs as nobody
    home, ca, ca_key = make_home(root)
    (root / "wrong-ca.crt").write_bytes(certificate("somebody else", None)[0].public_bytes(Encoding.PEM))
    write_server_certificate(root, ca, ca_key, days=-1, stem="expired")
    for name, study in studies.items():
        (root / f"{name}.toml").write_text(study_text(study))
    _make_sites(root, list(studies))
    with ExitStack() as stack:
        supervisor = stack.enter_context(
            running([*FL_SERVER, "superlink", "--home", str(root), "--exec"], root / "superlink.log", environment())
        )
        wait_until(lambda: listens(home.superlink_port), "SuperLink on its port")
        expired = free_port()
        text = (
            nginx_configuration(home, listen=f"127.0.0.1:{expired}")
            .replace("/server.", "/expired.")
            .replace("nginx.pid", "b.pid")
        )
        (home.proxy / "expired.conf").write_text(text)
        for configuration in ("nginx.conf", "expired.conf"):
            stack.enter_context(public_port(home, home.proxy / configuration))
        wait_until(lambda: listens(home.public_port) and listens(expired), "nginx on its ports")
        yield Coordinator(home, supervisor, root / "wrong-ca.crt", expired)
    shutil.rmtree(root)


def _make_sites(root: Path, approved: list[str]) -> None:
    people = {"train_patients": 2, "val_patients": 1, "test_patients": 1}
    write_phantoms(root / "data", seed=1, size_px=32, sites=[PhantomSite(name=name, **people) for name in NAMES])
    names = ", ".join(f'"../../{name}.toml"' for name in approved if name != "unknown")
    for name in NAMES:
        folder = root / "sites" / name
        folder.mkdir(parents=True)
        text = f'name = "{name}"\ndata = "../../data"\nstudies = [{names}]\ncache = "cache"\nallow_test_only = true\n'
        (folder / "site.toml").write_text(text)
        done = CliRunner().invoke(cli.app, ["--site", name, "--config", str(folder / "site.toml"), "prepare"])
        assert done.exit_code == 0, done.output
        make_node_key(folder / "node")


@pytest.fixture(scope="module")
def sites(coordinator: Coordinator) -> Iterator[None]:
    """Three admitted hospitals, connected through the public port."""
    flower_home = coordinator.home.folder / "flwr"
    with ExitStack() as stack:
        for name in NAMES:
            key = coordinator.node_key(name)
            done = flwr(flower_home, "supernode", "register", f"{key}.pub", "coordinator", "--name", name)
            assert "registered successfully" in done.stdout, done.stderr
            stack.enter_context(_supernode(coordinator, name))
        yield


def _supernode(coordinator: Coordinator, name: str):
    command = supernode_command(coordinator.public, coordinator.home.ca, coordinator.node_key(name))
    settings = environment(FL_CLIENT_SITE_FILE=str(coordinator.site_file(name)))
    return running(command, coordinator.home.root / f"{name}.log", settings)


def status_of(answer: bytes) -> int:
    words = answer.split(b" ", 2)
    return int(words[1]) if answer.startswith(b"HTTP/") else 0


def from_nginx(answer: bytes) -> bool:
    return b"<center>nginx</center>" in answer


# From a hospital's position: the public port, the consortium's CA, no more.
CLOSED = [
    *("/", "/health", "/docs", "/openapi.json", "/redoc", "/metrics", "/v1/fleet", "/v1/fleet/", "/v1/fleet/pull-messages/"),
    *("/v1/control/list-runs", "/v1/control/start-run", "/v1/control/register-node", "/v1/runtime/acquire-task"),
    *("/v1/runtime/responses", "/v1/fleet/register-node", "/v1/fleet/unregister-node", "/V1/FLEET/pull-messages"),
    *("/v1/fleet/../control/list-runs", "/v1/fleet/%2e%2e/control/list-runs", "/v1/fleet/%2E%2E/control/list-runs"),
    *("/v1/fleet%2f..%2fcontrol/list-runs", "/v1/fleet/..%2fcontrol%2flist-runs", "/v1/fleet/%252e%252e/control/list-runs"),
    *("//v1//fleet/pull-messages", "/v1/control/../fleet/pull-messages", "/v1/fleet/./pull-messages", "/v1/fleet//pull-messages"),
    *("/v1/%66leet/pull-messages", "/v1/fleet/pull-messages?x=1", "/v1/fleet/pull-messages;x", "/v1/fleet/pull-messages%00"),
    *("/v1/fleet/..;/control/list-runs", "/v1/fleet\\..\\control\\list-runs", "/v1/fleet/pull-messages/../../control/list-runs"),
    "https://127.0.0.1/v1/control/list-runs",
    "https://127.0.0.1/v1/fleet/../control/list-runs",
    "http://127.0.0.1@elsewhere/v1/control/list-runs",
]


@pytest.mark.parametrize("path", CLOSED)
@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_the_public_port_answers_404_to_all_but_a_nodes_calls(path: str, version: str, coordinator: Coordinator) -> None:
    answer = raw(coordinator.home.public_port, post(path, version=version), ca=coordinator.home.ca)
    assert status_of(answer) in {404, 400}, answer[:200]
    assert from_nginx(answer)  # nothing of it reached the SuperLink
    assert status_of(answer) == 404 or "%00" in path or "@" in path


@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize("path", ["/v1/fleet/pull-messages", "https://127.0.0.1/v1/fleet/pull-messages"])
def test_a_nodes_call_reaches_the_superlink_which_asks_for_its_signature(
    path: str, version: str, coordinator: Coordinator
) -> None:
    answer = raw(coordinator.home.public_port, post(path, version=version), ca=coordinator.home.ca)
    assert status_of(answer) == 401
    assert not from_nginx(answer)


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "PUT", "DELETE", "TRACE", "CONNECT", "PRI"])
def test_other_methods_are_refused_without_a_word_that_flower_misreads(method: str, coordinator: Coordinator) -> None:
    request = post("/v1/fleet/pull-messages").replace(b"POST", method.encode(), 1)
    assert status_of(raw(coordinator.home.public_port, request, ca=coordinator.home.ca)) in {400, 404, 405}


def test_http2_is_not_spoken_and_a_doubled_length_is_refused(coordinator: Coordinator) -> None:
    port, ca = coordinator.home.public_port, coordinator.home.ca
    assert status_of(raw(port, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0" * 9, ca=ca)) in {0, 400, 505}
    with suppress(OSError):  # either no connection at all, or one of HTTP/1.1
        assert not raw(port, post("/v1/control/list-runs"), ca=ca, protocols=["h2"]).startswith(b"HTTP/1.1 200")
    smuggled = post(
        "/v1/fleet/pull-messages", b"0\r\n\r\n" + post("/v1/control/list-runs"), headers="Transfer-Encoding: chunked\r\n"
    )
    answer = raw(port, smuggled, ca=ca)
    assert status_of(answer) == 400
    assert answer.count(b"HTTP/1.1") == 1


def padding(size: int) -> bytes:
    """A protobuf message of one unknown field of `size` bytes."""
    length, rest = bytearray(), size
    while rest > 127:
        length.append(rest & 127 | 128)
        rest >>= 7
    return b"\x7a" + bytes([*length, rest]) + bytes(size)


def test_a_chunk_of_flowers_size_passes_and_a_larger_body_does_not(coordinator: Coordinator) -> None:
    port, ca = coordinator.home.public_port, coordinator.home.ca
    passed = raw(port, post("/v1/fleet/push-object", padding(5 * 2**20 + 65536)), ca=ca)
    assert not from_nginx(passed)
    assert status_of(passed) == 401  # the SuperLink read it and asks for the signature
    assert status_of(raw(port, post("/v1/fleet/push-object", padding(7 * 2**20)), ca=ca)) == 413
    assert not any((coordinator.home.proxy / "run" / "body").rglob("*"))


HANDSHAKES = {
    "TLS 1.3": (["-tls1_3"], True),
    "TLS 1.2": (["-tls1_2"], True),
    "TLS 1.1": (["-tls1_1", "-cipher", "ALL:@SECLEVEL=0"], False),
    "TLS 1.2 without forward secrecy": (["-tls1_2", "-cipher", "AES128-GCM-SHA256"], False),
    "TLS 1.2 with CBC": (["-tls1_2", "-cipher", "ECDHE-ECDSA-AES128-SHA"], False),
}


@pytest.mark.parametrize("name", HANDSHAKES)
def test_only_modern_tls_is_spoken(name: str, coordinator: Coordinator) -> None:
    options, shakes = HANDSHAKES[name]
    command = ["openssl", "s_client", "-connect", coordinator.public, "-CAfile", str(coordinator.home.ca), *options]
    done = subprocess.run(command, input=b"", capture_output=True, timeout=30, check=False)
    assert (b"Cipher is (NONE)" not in done.stdout) is shakes
    assert (b"Verify return code: 0 (ok)" in done.stdout) or not shakes


def test_flowers_command_line_is_refused_from_a_hospital(coordinator: Coordinator, sites: None) -> None:
    folder = coordinator.home.root / "hospital-flwr"
    folder.mkdir()
    text = f'[superlink.public]\naddress = "{coordinator.public}"\nroot-certificates = "{coordinator.home.ca}"\n'
    (folder / "config.toml").write_text(text)
    make_node_key(folder / "intruder")
    app = folder / "app"
    write_app(app)
    for attempt in (
        ["list", "public"],
        ["run", str(app), "public"],
        ["supernode", "register", f"{folder / 'intruder'}.pub", "public"],
        ["supernode", "list", "public"],
        ["federation", "list", "public"],
    ):
        done = flwr(folder, *attempt)
        assert done.returncode != 0, attempt
        assert "404" in done.stdout + done.stderr, (attempt, done.stdout, done.stderr)
    # the same commands work on the coordinator's own machine, so it is the port that refuses
    assert '"success": true' in flwr(coordinator.home.folder / "flwr", "list", "coordinator", "--format", "json").stdout


INTRUDERS = {
    "no TLS": "400",
    "a wrong CA": "CERTIFICATE_VERIFY_FAILED",
    "an expired certificate": "certificate has expired",
    "no key": "404",
    "an unregistered key": "[code:",
    "another site's key": "[code:",
}


@pytest.fixture(scope="module")
def intruders(coordinator: Coordinator, sites: None) -> dict[str, str]:
    """What each SuperNode that must not get in says; all at once, each for half a minute at most."""
    home = coordinator.home
    stranger, known = make_node_key(home.root / "stranger"), coordinator.node_key("hospitalA")
    wait_until(lambda: b"SuperNode ID" in (home.root / "hospitalA.log").read_bytes(), "hospitalA to be connected")
    commands = {
        "no TLS": supernode_command(coordinator.public, None, None),
        "a wrong CA": supernode_command(coordinator.public, coordinator.wrong_ca, known),
        "an expired certificate": supernode_command(f"127.0.0.1:{coordinator.expired_port}", home.ca, known),
        "no key": supernode_command(coordinator.public, home.ca, None),
        "an unregistered key": supernode_command(coordinator.public, home.ca, stranger),
        "another site's key": supernode_command(coordinator.public, home.ca, known),
    }
    logs = {name: home.root / f"{name}.log" for name in commands}
    settings = environment(FL_CLIENT_SITE_FILE=str(coordinator.site_file("hospitalB")))
    with ExitStack() as stack:
        for name, command in commands.items():
            stack.enter_context(running([*command, "--max-retries", "2", "--max-wait-time", "8"], logs[name], settings))
        with suppress(AssertionError):
            wait_until(lambda: all(INTRUDERS[name] in log.read_text() for name, log in logs.items()), "all refused", 40)
    return {name: log.read_text() for name, log in logs.items()}


@pytest.mark.parametrize("name", INTRUDERS)
def test_who_does_not_belong_is_refused_and_told_why(name: str, intruders: dict[str, str]) -> None:
    said = intruders[name]
    assert INTRUDERS[name] in said, said[-1500:]
    assert "SuperNode ID" not in said


def test_a_study_survives_the_kill_of_its_superlink_and_equals_the_simulation(
    coordinator: Coordinator, sites: None, studies: dict[str, Study], tmp_path: Path
) -> None:
    home, study = coordinator.home, studies["first"]
    folder = home.runs / f"first-{study.digest[:12]}"
    log = home.root / "run.log"
    with running([*FL_SERVER, "run", str(coordinator.study("first")), "--home", str(home.root)], log, environment()) as run:
        wait_until(lambda: (folder / "study.state.safetensors").exists(), "the first round", 180)
        again = fl_server("run", str(coordinator.study("first")), "--home", str(home.root))
        assert again.returncode == 1
        assert "ICM506" in again.stderr
        os.kill(children_of(coordinator.supervisor.pid)["flower-superlink"], signal.SIGKILL)
        assert run.wait(timeout=240) == 0, log.read_text()
    said = log.read_text()
    assert study.digest in said
    assert "round 1 of 2: 3 of 3 sites, loss " in said
    assert "round 2 of 2: 3 of 3 sites, loss " in said
    assert "validation Dice after round 2: " in said
    assert "ICM328 flower-superlink" in (home.root / "superlink.log").read_text()
    federated = load_file(folder / "study.model.safetensors")
    simulated = _simulated(coordinator, study, tmp_path)
    assert federated.keys() == simulated.keys()
    assert all(np.array_equal(federated[name], tensor) for name, tensor in simulated.items())


def _simulated(coordinator: Coordinator, study: Study, folder: Path) -> dict[str, np.ndarray]:
    """The final tensors of the same study and sites on Flower's simulation engine."""
    from simulations.federation import Engine, Job, run_jobs, write_sites

    sites = [replace(read_site(coordinator.site_file(name)), state_folder=folder) for name in NAMES]
    write_sites(folder / "sites.json", sites)
    job = Job(method="router-aware", study=study, names=NAMES, state_path=folder / "state.safetensors")
    done = run_jobs([job], folder / "sites.json", Engine(cpus=2), lambda *_: None)
    return done["router-aware", study.seed].arrays


def test_a_second_study_runs_on_the_same_superlink(coordinator: Coordinator, sites: None) -> None:
    home = str(coordinator.home.root)
    done = fl_server("run", str(coordinator.study("second")), "--home", home, "--json", timeout_s=240)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(record["round"], sorted(record["sites"])) for record in records] == [(1, list(NAMES))]
    listed = json.loads(fl_server("list", "--home", home, "--json").stdout)
    assert (listed[0]["study"], listed[0]["status"], listed[0]["rounds_done"]) == ("second", "finished:completed", 1)
    complete = fl_server("run", str(coordinator.study("second")), "--home", home)
    assert complete.returncode == 0
    assert "second is complete" in complete.stdout
    assert len(json.loads(fl_server("list", "--home", home, "--json").stdout)) == len(listed)  # nothing was submitted


def test_a_run_that_fails_says_why_and_exits_with_one(coordinator: Coordinator, sites: None) -> None:
    home = str(coordinator.home.root)
    done = fl_server("run", str(coordinator.study("unknown")), "--home", home, timeout_s=240)
    assert done.returncode == 1
    for name in NAMES:
        assert f"ICM302 {name}: " in done.stderr
    assert "ICM507" in done.stderr
    assert "Traceback" not in done.stderr
    shown = json.loads(fl_server("status", "--home", home, "--json").stdout)
    assert [(row["study"], row["status"]) for row in shown] == [("unknown", "finished:failed")]
    gone = fl_server("stop", shown[0]["run"], "--home", home)
    assert gone.returncode == 1
    assert "ICM508" in gone.stderr


def test_the_coordinator_leaves_nothing_behind(coordinator: Coordinator) -> None:
    coordinator.supervisor.send_signal(signal.SIGTERM)
    assert coordinator.supervisor.wait(timeout=20) == 0
    marker = str(coordinator.home.superlink).encode()
    left = [path for path in Path("/proc").glob("[0-9]*/cmdline") if b"flower-superexec" in _read(path) and marker in _read(path)]
    assert left == []
    assert not listens(coordinator.home.superlink_port)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""

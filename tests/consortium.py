"""A consortium on loopback for tests: certificates, keys, phantoms, and the real programs as child processes."""

from __future__ import annotations

import datetime as dt
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from loopback import NOW
from safetensors.numpy import load_file
from typer.testing import CliRunner

from fl_client import cli
from fl_client.credentials import make_node_key
from fl_client.kit import join
from fl_client.participant import read_site
from fl_server import cli as server
from fl_server.certificates import ca_certificate, key_pem, make_key, parse_key, server_certificate
from fl_server.home import Home, read_home
from fl_server.provisioning import Provisioned, provision
from fl_server.superlink import nginx_configuration
from icmoe.atomic import write_atomically
from icmoe.errors import IcmoeError
from icmoe.joining import make_request, parse_certificate, public_text
from icmoe.processes import free_port, program
from icmoe.study import Study

ROOT = Path(__file__).parents[1]
PEM = Encoding.PEM
FL_SERVER = [sys.executable, "-c", "from fl_server.cli import main; main()"]
FL_CLIENT = [sys.executable, "-c", "from fl_client.cli import main; main()"]


TEXT = """\
name = "Lesion group"
[coordinator]
address = "coordinator.example:443"
names = ["10.1.2.3"]
superlink_port = {port}
"""


def write_consortium(folder: Path, *sites: str, port: int = 8000, text: str = TEXT) -> Path:
    path = folder / "consortium.toml"
    entries = "".join(f'[[sites]]\nname = "{site}"\n' for site in sites or ("Alder", "Birch"))
    path.write_text(text.format(port=port) + entries)
    return path


def make(folder: Path, *sites: str, renew: bool = False, now: dt.datetime = NOW, **settings: object) -> Provisioned:
    return provision(write_consortium(folder, *sites, **settings), folder / "out", renew=renew, now=now)


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def numbers(error: pytest.ExceptionInfo[IcmoeError]) -> list[int]:
    return [fault.number for fault in error.value.faults]


def serve(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(server.app, [str(argument) for argument in arguments])
    assert "Traceback" not in done.output
    return done.exit_code, done.output


def init(kit: Path, folder: Path, *extra: object, site: str = "Alder") -> tuple[int, str]:
    arguments = ["--site", site, "--config", folder / "site" / f"{site}.toml", "init", "--kit", kit, *extra]
    done = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert "Traceback" not in done.output
    return done.exit_code, done.output


def request_of(folder: Path, site: str, *, ca: Path | None = None) -> Path:
    kit = folder / "out" / "sites" / site / "kit"
    join(kit, site, folder / "site" / f"{site}.toml", digest=None, new_key=False, now=NOW)
    path = folder / "site" / site / "request.json"
    if ca is not None:
        foreign = make_request(site, ec.generate_private_key(ec.SECP384R1()), parse_certificate(ca.read_bytes(), where=""))
        path.write_text(foreign.model_dump_json())
    return path


def make_home(root: Path, *sites: str, address: str | None = None) -> Home:
    """The coordinator's folder as `fl_server provision` leaves it, on free loopback ports."""
    root.mkdir(parents=True, exist_ok=True)
    text = TEXT.replace("coordinator.example:443", address or f"127.0.0.1:{free_port()}")
    source = write_consortium(root, *sites, port=free_port(), text=text).rename(root / "source.toml")
    code, output = serve("provision", source, "--out", root)
    assert code == 0, output
    return read_home(root)


def write_expired_certificate(home: Home) -> None:
    """A certificate of the consortium's own CA, as the coordinator's except that it has ended."""
    key, ca = make_key(), parse_certificate(home.ca.read_bytes(), where="")
    start = dt.datetime.now(dt.UTC) - dt.timedelta(days=3)
    leaf = server_certificate(("127.0.0.1",), key.public_key(), ca, parse_key(home.signing_key.read_bytes(), where=""), 1, start)
    write_atomically(home.folder / "expired.crt", leaf.public_bytes(PEM) + ca.public_bytes(PEM))
    write_atomically(home.folder / "expired.key", key_pem(key), private=True)


def write_wrong_ca(path: Path) -> Path:
    ca = ca_certificate("somebody else", make_key(), 2, dt.datetime.now(dt.UTC))
    path.write_bytes(ca.public_bytes(PEM))
    return path


def write_key_pair(path: Path) -> Path:
    """A key that nobody admitted: `path` and `path`.pub."""
    key = make_node_key(path)
    path.with_suffix(".pub").write_text(public_text(key.public_key()))
    return path


def environment(**changes: str) -> dict[str, str]:
    """The tests' own packages first, for every process that Flower starts."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "OMP_NUM_THREADS": "1"}
    scripts = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PYTHONPATH": path, "PATH": scripts, "COLUMNS": "200", **quiet, **changes}


def fl_server(*arguments: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    command = [*FL_SERVER, *arguments]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=timeout_s, check=False, cwd="/")


def flwr(folder: Path, *arguments: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    """Flower's own command line with `folder` as its home."""
    command = [program("flwr"), *arguments]
    settings = environment(FLWR_HOME=str(folder))
    return subprocess.run(command, env=settings, capture_output=True, text=True, timeout=timeout_s, check=False, cwd="/")


def supernode_command(address: str, ca: Path | None, key: Path | None) -> list[str]:
    trust = ["--root-certificates", str(ca)] if ca is not None else ["--insecure"]
    proof = ["--auth-supernode-private-key", str(key)] if key is not None else []
    return [program("flower-supernode"), "--superlink", address, *trust, *proof, "--port", str(free_port())]


@contextmanager
def running(
    command: list[str], log: Path, settings: Mapping[str, str], *, user: int | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A child in its own session; it and all that it started are gone afterwards."""
    who = {} if user is None else {"user": user, "group": user, "extra_groups": []}
    with log.open("ab") as out:
        process = subprocess.Popen(
            command, env=dict(settings), stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True, cwd="/", **who
        )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=15)


def wait_until(true: Callable[[], object], what: str, timeout_s: float = 60.0) -> None:
    ends = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < ends, f"not within {timeout_s:.0f} s: {what}"
        time.sleep(0.2)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0


NOBODY = 65534
NO_NGINX = "nginx is not installed (apt-get install nginx)"
NGINX = shutil.which("nginx", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"]))
BEHIND_NGINX = pytest.mark.skipif(NGINX is None and not os.environ.get("CI"), reason=NO_NGINX)


@contextmanager
def public_port(home: Home, configuration: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Debian's nginx with a configuration of `fl_server superlink`, as an unprivileged user."""
    user = NOBODY if os.geteuid() == 0 else None
    if user is not None:
        for path in (home.proxy / "run", *home.folder.glob("*.key")):
            os.chown(path, user, user)
    assert NGINX is not None
    command = [NGINX, "-e", "stderr", "-c", str(configuration)]
    with running(command, home.root / f"{configuration.stem}.log", environment(), user=user) as process:
        yield process


def raw(port: int, request: bytes, *, ca: Path, protocols: list[str] | None = None) -> bytes:
    """The answer to these very bytes over TLS."""
    context = ssl.create_default_context(cafile=str(ca))
    if protocols:
        context.set_alpn_protocols(protocols)
    plain = socket.create_connection(("127.0.0.1", port), timeout=20)
    answer = b""
    with context.wrap_socket(plain, server_hostname="127.0.0.1") as secure:
        with suppress(OSError):  # an answer may come before all is sent
            secure.sendall(request)
        with suppress(OSError):
            while chunk := secure.recv(65536):
                answer += chunk
    return answer


def post(path: str, body: bytes = b"", *, version: str = "1.1", headers: str = "") -> bytes:
    head = f"POST {path} HTTP/{version}\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Length: {len(body)}\r\n"
    head += "Content-Type: application/protobuf\r\n"
    return (head + headers + "\r\n").encode() + body


def children_of(pid: int) -> dict[str, int]:
    """Process numbers of a process's children by the name of the program in their command line."""
    found = {}
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        words = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
        found[next((Path(word.decode()).name for word in words if b"flower-" in word or b"flwr-" in word), "")] = int(child)
    return found


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
        return self.home.root / "hospitals" / f"{name}.toml"

    def node_key(self, name: str) -> Path:
        return self.home.root / "hospitals" / name / "node.key"

    def study(self, name: str) -> Path:
        return self.home.root / f"{name}.toml"


def client(site_file: Path, *words: str) -> str:
    """What the hospital's command prints; it must succeed."""
    done = CliRunner().invoke(cli.app, ["--site", site_file.stem, "--config", str(site_file), *words])
    assert done.exit_code == 0, done.output
    return done.output


def serving(home: Home, log: Path):
    """`fl_server superlink --exec`."""
    return running([*FL_SERVER, "superlink", "--home", str(home.root), "--exec"], log, environment())


def participating(site_file: Path, log: Path):
    """`fl_client --site NAME`: preflight, supervisor, pinned SuperNode."""
    command = [*FL_CLIENT, "--site", site_file.stem, "--config", str(site_file)]
    return running(command, log, environment(COLUMNS="500"))


@contextmanager
def coordinating(*sites: str, address: str | None = None) -> Iterator[Coordinator]:
    """SuperLink, SuperExec and nginx on loopback, and a second nginx whose certificate has expired."""
    root = Path(tempfile.mkdtemp(prefix="icmoe-federation-"))
    home = make_home(root, *sites, address=address)
    for folder in (root, home.folder):
        folder.chmod(0o711)  # nginx runs as nobody
    wrong_ca = write_wrong_ca(root / "wrong-ca.crt")
    write_expired_certificate(home)
    with ExitStack() as stack:
        supervisor = stack.enter_context(serving(home, root / "superlink.log"))
        wait_until(lambda: listens(home.superlink_port), "SuperLink on its port")
        expired = free_port()
        text = nginx_configuration(home, listen=f"127.0.0.1:{expired}")
        (home.proxy / "expired.conf").write_text(text.replace("/server.", "/expired.").replace("nginx.pid", "b.pid"))
        for configuration in ("nginx.conf", "expired.conf"):
            stack.enter_context(public_port(home, home.proxy / configuration))
        wait_until(lambda: listens(home.public_port) and listens(expired), "nginx on its ports")
        yield Coordinator(home, supervisor, wrong_ca, expired)
    shutil.rmtree(root)


def assert_as_simulated(model: Path, study: Study, site_files: Sequence[Path], folder: Path) -> None:
    """The model of a federation has the bits of the one that the same study and sites give on Flower's simulation engine."""
    from simulations.federation import Engine, Job, run_jobs, write_sites

    sites = [replace(read_site(path, study.digest), state_folder=folder, audited=False) for path in site_files]
    write_sites(folder / "sites.json", sites)
    names = tuple(site.name for site in sites)
    job = Job(method="router-aware", study=study, names=names, state_path=folder / "state.safetensors")
    simulated = run_jobs([job], folder / "sites.json", Engine(cpus=2), lambda *_: None)["router-aware", study.seed].arrays
    federated = load_file(model)
    assert federated.keys() == simulated.keys()
    assert all(np.array_equal(federated[name], tensor) for name, tensor in simulated.items())

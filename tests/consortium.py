"""A consortium on loopback for tests: certificates, keys, phantoms, and the real programs as child processes."""

from __future__ import annotations

import datetime as dt
import ipaddress
import json
import os
import secrets
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fl_server.home import Home, read_home
from fl_server.superlink import nginx_configuration, program
from icmoe.study import Study, canonical

ROOT = Path(__file__).parents[1]
Key = ec.EllipticCurvePrivateKey
PEM, OPENSSH = serialization.Encoding.PEM, serialization.Encoding.OpenSSH
FL_SERVER = [sys.executable, "-c", "from fl_server.cli import main; main()"]
NOT_ENCRYPTED = serialization.NoEncryption()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def write_private(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    path.chmod(0o600)
    return path


def certificate(name: str, issuer: tuple[x509.Name, Key] | None, *, days: int = 2) -> tuple[x509.Certificate, Key]:
    """A CA without an issuer, a server certificate for loopback with one; with negative days one that has expired."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    issuer_name, issuer_key = issuer or (subject, key)
    start = dt.datetime.now(dt.UTC) - dt.timedelta(days=3)
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer_name).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number()).not_valid_before(start)
    builder = builder.not_valid_after(start + dt.timedelta(days=3 + days))
    builder = builder.add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
    if issuer is not None:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(issuer_key, hashes.SHA256()), key


def write_server_certificate(home: Path, ca: x509.Certificate, ca_key: Key, *, days: int = 2, stem: str = "server") -> None:
    leaf, key = certificate("coordinator", (ca.subject, ca_key), days=days)
    (home / "coordinator").mkdir(parents=True, exist_ok=True)
    (home / "coordinator" / f"{stem}.crt").write_bytes(leaf.public_bytes(PEM) + ca.public_bytes(PEM))
    data = key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, NOT_ENCRYPTED)
    write_private(home / "coordinator" / f"{stem}.key", data)


def make_home(root: Path) -> tuple[Home, x509.Certificate, Key]:
    """The coordinator's folder as `fl_server provision` leaves it, on free loopback ports."""
    root.mkdir(parents=True, exist_ok=True)
    ca, ca_key = certificate("consortium", None)
    write_server_certificate(root, ca, ca_key)
    (root / "coordinator" / "ca.crt").write_bytes(ca.public_bytes(PEM))
    write_private(root / "coordinator" / "superexec.secret", secrets.token_hex(32).encode())
    text = f'name = "loopback"\n[coordinator]\naddress = "127.0.0.1:{free_port()}"\nsuperlink_port = {free_port()}\n'
    (root / "consortium.toml").write_text(text)
    return read_home(root), ca, ca_key


def make_node_key(path: Path) -> Path:
    """A site's key pair: `path` and `path`.pub."""
    key = ec.generate_private_key(ec.SECP384R1())
    write_private(path, key.private_bytes(PEM, serialization.PrivateFormat.OpenSSH, NOT_ENCRYPTED))
    path.with_suffix(".pub").write_bytes(key.public_key().public_bytes(OPENSSH, serialization.PublicFormat.OpenSSH))
    return path


def study_text(study: Study) -> str:
    """The study as TOML with every default spelled out."""
    values = json.loads(canonical(study))
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items() if not isinstance(value, dict | list)]
    lines += [f"[[labels]]\nname = {json.dumps(label['name'])}\nvalues = {label['values']}" for label in values["labels"]]
    for section, keys in values.items():
        if isinstance(keys, dict):
            lines.append(f"[{section}]\n" + "\n".join(f"{key} = {json.dumps(value)}" for key, value in keys.items()))
    return "\n".join(lines) + "\n"


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
        return self.home.root / "sites" / name / "site.toml"

    def node_key(self, name: str) -> Path:
        return self.home.root / "sites" / name / "node"

    def study(self, name: str) -> Path:
        return self.home.root / f"{name}.toml"


@contextmanager
def coordinating() -> Iterator[Coordinator]:
    """SuperLink, SuperExec and nginx on loopback, and a second nginx whose certificate has expired."""
    root = Path(tempfile.mkdtemp(prefix="icmoe-federation-"))
    root.chmod(0o755)  # nginx runs as nobody
    home, ca, ca_key = make_home(root)
    (root / "wrong-ca.crt").write_bytes(certificate("somebody else", None)[0].public_bytes(PEM))
    write_server_certificate(root, ca, ca_key, days=-1, stem="expired")
    command = [*FL_SERVER, "superlink", "--home", str(root), "--exec"]
    with ExitStack() as stack:
        supervisor = stack.enter_context(running(command, root / "superlink.log", environment()))
        wait_until(lambda: listens(home.superlink_port), "SuperLink on its port")
        expired = free_port()
        text = nginx_configuration(home, listen=f"127.0.0.1:{expired}")
        (home.proxy / "expired.conf").write_text(text.replace("/server.", "/expired.").replace("nginx.pid", "b.pid"))
        for configuration in ("nginx.conf", "expired.conf"):
            stack.enter_context(public_port(home, home.proxy / configuration))
        wait_until(lambda: listens(home.public_port) and listens(expired), "nginx on its ports")
        yield Coordinator(home, supervisor, root / "wrong-ca.crt", expired)
    shutil.rmtree(root)

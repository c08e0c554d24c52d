"""The one public port from a hospital's position: real nginx with the written configuration before a real SuperLink."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import suppress

import pytest
from consortium import BEHIND_NGINX, Coordinator, coordinating, flwr, post, raw, write_key_pair
from handshake import FALLBACK_SIGNAL, SSL3, SUITES, TLS10, TLS11, TLS12, TLS13, greet

from fl_server.submit import write_app

pytestmark = [pytest.mark.network, BEHIND_NGINX]


@pytest.fixture(scope="module")
def coordinator() -> Iterator[Coordinator]:
    with coordinating() as found:
        yield found


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


# AEAD with forward secrecy for a certificate on an elliptic curve: 1.2's, then 1.3's.
GOOD = {TLS12: [0xC02B, 0xC02C, 0xCCA9], TLS13: [0x1301, 0x1302, 0x1303]}
REFUSED = {  # alert 40: no suite in common, 70: version, 86: a fallback that is no need
    "SSL 3": (SSL3, SUITES, {"alert 70", "alert 40", "closed"}),
    "TLS 1.0": (TLS10, SUITES, {"alert 70"}),
    "TLS 1.1": (TLS11, SUITES, {"alert 70"}),
    "no encryption": (TLS12, [0x0001, 0x0002, 0x003B, 0xC006, 0xC010], {"alert 40"}),
    "export": (TLS12, [0x0003, 0x0006, 0x0008, 0x000B, 0x000E, 0x0011, 0x0014, 0x0017, 0x0019], {"alert 40"}),
    "RC4": (TLS12, [0x0004, 0x0005, 0x0018, 0xC007, 0xC011, 0xC016], {"alert 40"}),
    "3DES": (TLS12, [0x000A, 0x0016, 0x001B, 0xC008, 0xC012, 0xC017], {"alert 40"}),
    "anonymous": (TLS12, [0x0034, 0x003A, 0x006C, 0x006D, 0x00A6, 0x00A7, 0xC018, 0xC019], {"alert 40"}),
    "no forward secrecy": (TLS12, [0x002F, 0x0035, 0x003C, 0x003D, 0x009C, 0x009D], {"alert 40"}),
    "CBC": (TLS12, [0xC009, 0xC00A, 0xC023, 0xC024, 0xC013, 0xC014], {"alert 40"}),
    "every other suite of TLS 1.2": (TLS12, [suite for suite in SUITES if suite not in GOOD[TLS12]], {"alert 40"}),
    "every other suite of TLS 1.3": (TLS13, [suite for suite in SUITES if suite not in GOOD[TLS13]], {"alert 40"}),
    "a forced fallback": (TLS12, [*GOOD[TLS12], FALLBACK_SIGNAL], {"alert 86"}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_no_weak_protocol_or_cipher_is_spoken(name: str, coordinator: Coordinator) -> None:
    version, suites, alerts = REFUSED[name]
    assert greet(coordinator.home.public_port, version, suites) in alerts


@pytest.mark.parametrize(("version", "suite"), [(version, suite) for version, suites in GOOD.items() for suite in suites])
def test_modern_ciphers_are_spoken_and_nothing_is_compressed(version: int, suite: int, coordinator: Coordinator) -> None:
    assert greet(coordinator.home.public_port, version, [suite]) == (suite, 0)
    if version == TLS12:
        assert greet(coordinator.home.public_port, version, [suite], b"\1\0") == (suite, 0)


@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
def test_the_certificate_leads_to_the_consortium_and_nobody_may_renegotiate(version: str, coordinator: Coordinator) -> None:
    command = ["openssl", "s_client", "-connect", coordinator.public, "-CAfile", str(coordinator.home.ca), version]
    strict = ["-verify_return_error", "-verify_ip", "127.0.0.1", "-x509_strict"]
    done = subprocess.run([*command, *strict], input=b"R\n", capture_output=True, timeout=30, check=False)
    assert b"Verify return code: 0 (ok)" in done.stdout
    assert b"Peer signing digest: SHA" in done.stdout
    assert b"Compression: NONE" in done.stdout
    if version == "-tls1_2":
        assert b"RENEGOTIATING" in done.stdout + done.stderr
        assert b"Secure Renegotiation IS supported" in done.stdout
        assert done.returncode != 0  # the server closed
        assert b"HTTP/1.1" not in done.stdout


def test_flowers_command_line_is_refused_from_a_hospital(coordinator: Coordinator) -> None:
    folder = coordinator.home.root / "hospital-flwr"
    folder.mkdir()
    text = f'[superlink.public]\naddress = "{coordinator.public}"\nroot-certificates = "{coordinator.home.ca}"\n'
    (folder / "config.toml").write_text(text)
    write_key_pair(folder / "intruder")
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

"""The preflight of a site against real ports: each fault is found, has its number and remedy, and never a traceback."""

from __future__ import annotations

import datetime as dt
import shutil
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from loopback import FLEET, HOSTS, NOW, Authority, closed_port, http_server, raw_server

from fl_client import connection
from fl_client.connection import proxy_of
from fl_client.flower_private import OTHER_APIS
from fl_client.preflight import run_preflight
from icmoe.errors import IcmoeError

if TYPE_CHECKING:
    from hospitals import Hospital

pytest_plugins = ["hospitals"]


def test_a_site_without_faults_sees_every_check_passed(hospital: Hospital, authority: Authority) -> None:
    with http_server(tls=authority.server(*HOSTS)) as (port, asked):
        code, output = hospital.at(port).run()
        assert code == 0, output
        assert "ICM" not in output
        names = [line.name for line in run_preflight(hospital.path)]
    assert names[:10] == [
        *("site file", "key", "CA", "name", "port", "coordinator", "server certificate", "clock", "admission", "other APIs"),
    ]
    assert names[10:] == ["study", "backbone", "data", "features", "disk", "disk", "records", "device", "memory"]
    assert "POST /v1/fleet/pull-messages 0" in asked  # asked without any word of the site


def test_a_site_file_for_data_only_stays_valid(hospital: Hospital) -> None:
    code, output = hospital.run()
    assert code == 0
    assert "without [coordinator]" in output.replace("\n", " ")


# Certificates


def test_a_server_of_another_ca_is_not_trusted(hospital: Hospital, tmp_path: Path) -> None:
    with http_server(tls=Authority(tmp_path / "other").server(*HOSTS)) as (port, asked):
        fault = hospital.at(port).only_fault()
    assert (fault["number"], asked) == (308, [])
    assert "not signed by the consortium's CA" in fault["sentence"]
    assert "inspects TLS" in fault["sentence"]


@pytest.mark.parametrize(("days", "start", "words"), [(10, -30, "expired"), (10, 5, "not valid yet")])
def test_a_certificate_outside_its_dates_is_not_trusted(
    days: int, start: int, words: str, hospital: Hospital, authority: Authority
) -> None:
    context = authority.server(*HOSTS, days=days, now=NOW + dt.timedelta(days=start))
    with http_server(tls=context) as (port, asked):
        fault = hospital.at(port).only_fault()
    assert (fault["number"], asked) == (309, [])
    assert words in fault["sentence"]


def test_a_certificate_that_ends_soon_is_a_warning(hospital: Hospital, authority: Authority) -> None:
    with http_server(tls=authority.server(*HOSTS, days=20)) as (port, _):
        code, output = hospital.at(port).run()
    assert code == 0
    assert "ICM309" in output
    assert "19 days left" in output


def test_a_ca_that_has_ended_or_ends_within_a_quarter(hospital: Hospital, tmp_path: Path) -> None:
    for days, numbers, fine in ((480, [309], True), (390, [309, 309], False)):
        ending = Authority(tmp_path / str(days), days)
        shutil.copy(ending.path, hospital.ca)
        context = ending.server(*HOSTS, days=45, now=NOW - dt.timedelta(days=10 if fine else 30))
        with http_server(tls=context) as (port, _):
            faults = hospital.at(port).faults()
        assert [fault["number"] for fault in faults] == numbers
        assert all(fault["ok"] == fine for fault in faults)
        assert "new start kit" in faults[0]["sentence"]


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_a_certificate_for_another_name_is_not_trusted(host: str, hospital: Hospital, authority: Authority) -> None:
    with http_server(tls=authority.server("coordinator.example")) as (port, asked):
        fault = hospital.at(f"{host}:{port}").only_fault()
    assert (fault["number"], asked) == (308, [])
    assert "for another name" in fault["sentence"]


# Ports


def test_a_name_that_does_not_resolve(hospital: Hospital) -> None:
    fault = hospital.at("coordinator.invalid:443").only_fault()
    assert (fault["number"], fault["name"]) == (311, "name")


def test_a_closed_port(hospital: Hospital) -> None:
    fault = hospital.at(closed_port()).only_fault()
    assert (fault["number"], fault["name"]) == (311, "port")
    assert "Connection refused" in fault["sentence"]


def test_a_resolver_that_never_answers_is_not_waited_for(hospital: Hospital, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "TIMEOUT_S", 0.2)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(30))
    start = time.monotonic()
    assert hospital.at(443).only_fault()["number"] == 311
    assert time.monotonic() - start < 10


def test_a_plain_http_port(hospital: Hospital) -> None:
    with http_server(tls=None) as (port, asked):
        fault = hospital.at(port).only_fault()
    assert (fault["number"], asked) == (312, [])
    assert "does not speak TLS" in fault["sentence"]


def ssh(connection: socket.socket) -> None:
    connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
    connection.recv(100)


def drip(connection: socket.socket) -> None:
    for byte in b"HTTP/1.1 200 OK\r\nx: " + b"y" * 1000:
        connection.send(bytes([byte]))
        time.sleep(0.05)


SPEAKERS = {
    "SSH": (ssh, False, "does not speak TLS"),
    "nothing, and resets": (lambda connection: connection.recv(1), False, "closes the connection"),
    "nothing, and ends": (lambda connection: connection.recv(4096), False, "does not speak TLS"),
    "nothing, and stays": (lambda connection: time.sleep(10), False, "does not answer"),
    "TLS, and ends": (lambda connection: connection.recv(4096), True, "not HTTP"),
    "SSH inside TLS": (ssh, True, "not HTTP"),
    "one byte at a time": (drip, True, "too slowly"),
}


@pytest.mark.parametrize("name", SPEAKERS)
def test_a_port_that_speaks_something_else(
    name: str, hospital: Hospital, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "TIMEOUT_S", 2.0)
    monkeypatch.setattr(connection, "DEADLINE_S", 4.0)
    talk, tls, words = SPEAKERS[name]
    with raw_server(talk, tls=authority.server(*HOSTS) if tls else None) as port:
        start = time.monotonic()
        fault = hospital.at(port).only_fault()
    assert fault["number"] == 312
    assert words in fault["sentence"]
    assert time.monotonic() - start < 20


def test_https_that_is_not_flower_or_does_not_authenticate_or_has_no_superlink_behind(
    hospital: Hospital, authority: Authority
) -> None:
    path = "/v1/fleet/pull-messages"
    cases: list[tuple[dict[str, tuple[int, Any]], int, str]] = [
        ({}, 312, "not Flower's Fleet API: HTTP 404"),
        ({path: (401, {"detail": "who are you"})}, 312, "not Flower's Fleet API: HTTP 401"),
        ({path: (401, b"[" * 100_000)}, 312, "not Flower's Fleet API"),
        ({path: (200, b"")}, 312, "does not authenticate sites"),
        ({path: (502, b"<html>")}, 311, "SuperLink behind it does not"),
    ]
    for answers, number, words in cases:
        with http_server(answers, tls=authority.server(*HOSTS)) as (port, _):
            fault = hospital.at(port).only_fault()
        assert fault["number"] == number
        assert words in fault["sentence"]


def test_a_key_that_the_coordinator_does_not_know(hospital: Hospital, authority: Authority) -> None:
    answers = {**FLEET, "/v1/fleet/activate-node": (412, {"code": 2004, "detail": "Failed to activate SuperNode."})}
    with http_server(answers, tls=authority.server(*HOSTS)) as (port, _):
        fault = hospital.at(port).only_fault()
    assert (fault["number"], fault["name"]) == (314, "admission")


@pytest.mark.parametrize("path", ["/v1/control/list-runs", "/v1/runtime/acquire-task", "/openapi.json", "/docs"])
def test_an_open_control_api_is_a_loud_warning(path: str, hospital: Hospital, authority: Authority) -> None:
    with http_server({**FLEET, path: (200, b"")}, tls=authority.server(*HOSTS)) as (port, _):
        code, output = hospital.at(port).run()
    assert code == 0
    assert "ICM312" in output
    assert f"anybody could submit code to all sites: {path}." in output


def test_a_firewall_that_cuts_off_whatever_is_not_the_fleet_api_is_no_fault(hospital: Hospital, authority: Authority) -> None:
    others = {path: (0, b"") for _, path in OTHER_APIS}
    with http_server({**FLEET, **others}, tls=authority.server(*HOSTS)) as (port, asked):
        assert hospital.at(port).faults() == []
    assert {line.split()[1] for line in asked} >= others.keys()


@pytest.mark.parametrize(
    ("ahead_s", "fine"), [(-3600.0, False), (-8.0, False), (-2.0, True), (0.0, True), (280.0, True), (400.0, False), (1e5, False)]
)
def test_the_clock_is_compared_with_the_coordinators(
    ahead_s: float, fine: bool, hospital: Hospital, authority: Authority
) -> None:
    with http_server(tls=authority.server(*HOSTS), ahead_s=ahead_s) as (port, _):
        if fine:
            assert hospital.at(port).faults() == []
            return
        fault = hospital.at(port).only_fault()
    assert fault["number"] == 313
    assert ("s ahead of" if ahead_s < 0 else "s behind") in fault["value"]
    assert abs(int(fault["value"].split()[0]) - abs(ahead_s)) <= 1


# Outbound proxy


def tunnel(connection: socket.socket) -> None:
    """Serve CONNECT."""
    request = connection.recv(4096).split(b" ")
    if len(request) < 2:
        return  # only looked whether the port is open
    host, _, port = request[1].partition(b":")
    with socket.create_connection((host.decode(), int(port))) as far, ThreadPoolExecutor(1) as pool:
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        pool.submit(pour, far, connection)
        pour(connection, far)


def pour(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


def refuse(connection: socket.socket) -> None:
    connection.recv(4096)
    connection.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\ncontent-length: 0\r\n\r\n")


def test_the_way_goes_through_the_outbound_proxy(
    hospital: Hospital, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with http_server(tls=authority.server(*HOSTS)) as (port, asked):
        hospital.at(port)
        with raw_server(tunnel) as proxy:
            monkeypatch.setenv("HTTPS_PROXY", f"http://user:secret@127.0.0.1:{proxy}")
            assert hospital.faults() == []
            assert "outbound proxy" in hospital.run()[1]
            assert "secret" not in hospital.run()[1]
        seen = len(asked)
        assert seen
        with raw_server(refuse) as proxy:
            monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy}")
            fault = hospital.only_fault()
            assert (fault["number"], len(asked)) == (311, seen)
            assert "407" in fault["sentence"]
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{closed_port()}")
        assert hospital.only_fault()["number"] == 311
        monkeypatch.setenv("NO_PROXY", "localhost")
        assert hospital.faults() == []


def test_grpc_health_is_asked_where_an_address_is_given(hospital: Hospital, authority: Authority) -> None:
    service, server = health.HealthServicer(), grpc.server(ThreadPoolExecutor(2))
    health_pb2_grpc.add_HealthServicer_to_server(service, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        with http_server(tls=authority.server(*HOSTS)) as (port, _):
            hospital.at(port, health=address)
            service.set("", health_pb2.HealthCheckResponse.SERVING)
            assert hospital.faults() == []
            service.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
            assert "not_serving" in hospital.only_fault()["sentence"]
            hospital.at(port, health=f"127.0.0.1:{closed_port()}")
            assert hospital.only_fault()["number"] == 311
    finally:
        server.stop(0).wait(5)


@pytest.mark.parametrize("proxy", ["http://proxy.hospital:port", "http://[::1", "h:99999"])
def test_a_proxy_that_is_no_address_is_told_and_not_shown(proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", proxy)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with pytest.raises(IcmoeError, match=r"ICM311 .*proxy in the environment is no address") as told:
        proxy_of("coordinator.example")
    assert proxy not in str(told.value)

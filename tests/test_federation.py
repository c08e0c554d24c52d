"""A federation as hospitals meet it: real SuperLink, SuperExec, nginx and SuperNodes over TLS and node keys on loopback."""

from __future__ import annotations

import json
from contextlib import ExitStack, suppress

import pytest
from consortium import (
    BEHIND_NGINX,
    FL_SERVER,
    Coordinator,
    environment,
    fl_server,
    running,
    supernode_command,
    wait_until,
    write_key_pair,
)
from federated import coordinator, end_and_leave_nothing, sites, studies

from fl_server.commands import STOPPED

__all__ = ["coordinator", "sites", "studies"]
pytestmark = [pytest.mark.network, BEHIND_NGINX]


def test_a_run_that_is_stopped_ends_as_stopped(coordinator: Coordinator) -> None:
    """Before any hospital is connected: the run waits for its quorum."""
    home, log = str(coordinator.home.root), coordinator.home.root / "stopped.log"
    with running([*FL_SERVER, "run", str(coordinator.study("unknown")), "--home", home], log, environment()) as run:
        wait_until(lambda: "run        " in log.read_text(), "the run to be submitted", 60)
        wait_until(lambda: "running" in fl_server("status", "--home", home).stdout, "the run to be running", 60)
        number = json.loads(fl_server("status", "--home", home, "--json").stdout)[0]["run"]
        assert fl_server("stop", number, "--home", home).returncode == 0
        assert run.wait(timeout=60) == STOPPED
    assert f"ICM509 run was stopped: run {number}" in log.read_text()
    assert "Traceback" not in log.read_text()


def test_resume_stops_a_live_run_of_the_study_first(coordinator: Coordinator) -> None:
    home, study = str(coordinator.home.root), str(coordinator.study("unknown"))
    first, second = coordinator.home.root / "first.log", coordinator.home.root / "second.log"
    with running([*FL_SERVER, "run", study, "--home", home], first, environment()) as live:
        wait_until(lambda: "run        " in first.read_text(), "the run to be submitted", 60)
        wait_until(lambda: "waiting for" in first.read_text(), "the run to say whom it waits for", 120)
        with running([*FL_SERVER, "run", study, "--home", home, "--resume"], second, environment()) as resumed:
            assert live.wait(timeout=120) == STOPPED
            wait_until(lambda: "run        " in second.read_text(), "the second run to be submitted", 120)
            number = json.loads(fl_server("status", "--home", home, "--json").stdout)[0]["run"]
            assert number not in first.read_text()
            assert fl_server("stop", number, "--home", home).returncode == 0
            assert resumed.wait(timeout=120) == STOPPED
    assert "ICM509" in first.read_text()


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
    stranger, known = write_key_pair(home.root / "stranger"), coordinator.node_key("hospitalA")
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
    seen = [path.read_text() for path in (home.root / "nginx.log", home.root / "expired.log", home.proxy / "run" / "refused.log")]
    return {name: log.read_text() for name, log in logs.items()} | {"the coordinator": "\n".join(seen)}


@pytest.mark.parametrize("name", INTRUDERS)
def test_who_does_not_belong_is_refused_and_told_why(name: str, intruders: dict[str, str]) -> None:
    said = intruders[name]
    assert INTRUDERS[name] in said, said[-1500:]
    assert "SuperNode ID" not in said


def test_the_coordinator_sees_who_was_refused(intruders: dict[str, str]) -> None:
    said = intruders["the coordinator"]
    for what in ("alert unknown ca", "alert certificate expired", '"POST /v1/fleet/register-node HTTP/1.1" 404', " 400"):
        assert what in said, said[-3000:]


def test_the_coordinator_leaves_nothing_behind(coordinator: Coordinator) -> None:
    end_and_leave_nothing(coordinator)

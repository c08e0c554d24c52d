"""A federation as hospitals meet it: real SuperLink, SuperExec, nginx and SuperNodes over TLS and node keys on loopback."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from consortium import (
    FL_SERVER,
    NGINX,
    NO_NGINX,
    Coordinator,
    assert_as_simulated,
    children_of,
    client,
    coordinating,
    environment,
    fl_server,
    listens,
    participating,
    running,
    supernode_command,
    wait_until,
    write_key_pair,
)

from fl_server.home import Home
from fl_server.new_study import study_toml
from icmoe.study import Study, UpdateForm
from simulations.phantoms import PhantomSite, write_phantoms

pytestmark = [pytest.mark.network, pytest.mark.skipif(NGINX is None and not os.environ.get("CI"), reason=NO_NGINX)]

NAMES = ("hospitalA", "hospitalB", "hospitalC")


@pytest.fixture(scope="module")
def studies(make_study) -> dict[str, Study]:
    base = make_study(name="first", quorum=3, deadline_s=180.0)
    return {
        "first": base,
        "second": base.model_copy(update={"name": "second", "seed": 4, "update": UpdateForm(form="int8")}),
        "unknown": base.model_copy(update={"name": "unknown", "seed": 5}),
    }


@pytest.fixture(scope="module")
def coordinator(studies: dict[str, Study]) -> Iterator[Coordinator]:
    with coordinating(*NAMES) as found:
        for name, study in studies.items():
            found.study(name).write_text(study_toml(study))
        _make_hospitals(found.home, ["first", "second"])
        yield found


def _make_hospitals(home: Home, approved: list[str]) -> None:
    """From kit to features, by the hospital's own commands; the site file is filled in by hand in between."""
    people = {"train_patients": 2, "val_patients": 1, "test_patients": 1}
    write_phantoms(home.root / "data", seed=1, size_px=32, sites=[PhantomSite(name=name, **people) for name in NAMES])
    for name in NAMES:
        path = home.root / "hospitals" / f"{name}.toml"
        assert "request.json to the coordinator" in client(path, "init", "--kit", str(home.site(name) / "kit"))
        own = f'data = "../data"\ncache = "{name}/cache"\nstate = "{name}/state"\nallow_test_only = true\n'
        made = path.read_text()
        path.write_text(made[: made.index("[ingest]")] + own + made[made.index("[coordinator]") :])
        for study in approved:
            assert study in client(path, "approve", str(home.root / f"{study}.toml"), "--yes")
        client(path, "prepare")


def test_a_run_that_is_stopped_ends_as_stopped(coordinator: Coordinator) -> None:
    """Before any hospital is connected: the run waits for its quorum."""
    home, log = str(coordinator.home.root), coordinator.home.root / "stopped.log"
    with running([*FL_SERVER, "run", str(coordinator.study("unknown")), "--home", home], log, environment()) as run:
        wait_until(lambda: "run        " in log.read_text(), "the run to be submitted", 60)
        wait_until(lambda: "running" in fl_server("status", "--home", home).stdout, "the run to be running", 60)
        number = json.loads(fl_server("status", "--home", home, "--json").stdout)[0]["run"]
        assert fl_server("stop", number, "--home", home).returncode == 0
        assert run.wait(timeout=60) == 1
    assert f"ICM509 run was stopped: run {number}" in log.read_text()
    assert "Traceback" not in log.read_text()


def test_resume_stops_a_live_run_of_the_study_first(coordinator: Coordinator) -> None:
    home, study = str(coordinator.home.root), str(coordinator.study("unknown"))
    first, second = coordinator.home.root / "first.log", coordinator.home.root / "second.log"
    with running([*FL_SERVER, "run", study, "--home", home], first, environment()) as live:
        wait_until(lambda: "run        " in first.read_text(), "the run to be submitted", 60)
        wait_until(lambda: "waiting for" in first.read_text(), "the run to say whom it waits for", 120)
        with running([*FL_SERVER, "run", study, "--home", home, "--resume"], second, environment()) as resumed:
            assert live.wait(timeout=120) == 1
            wait_until(lambda: "run        " in second.read_text(), "the second run to be submitted", 120)
            number = json.loads(fl_server("status", "--home", home, "--json").stdout)[0]["run"]
            assert number not in first.read_text()
            assert fl_server("stop", number, "--home", home).returncode == 0
            assert resumed.wait(timeout=120) == 1
    assert "ICM509" in first.read_text()


@pytest.fixture(scope="module")
def sites(coordinator: Coordinator) -> Iterator[None]:
    """Three admitted hospitals, connected through the public port by `fl_client --site NAME`."""
    home = coordinator.home
    with ExitStack() as stack:
        for name in NAMES:
            path = coordinator.site_file(name)
            done = fl_server("admit", str(path.with_suffix("") / "request.json"), "--home", str(home.root))
            assert f"{name} is admitted as node " in done.stdout, done.stderr
            stack.enter_context(participating(path, home.root / f"{name}.log"))
        for name in NAMES:
            wait_until(lambda name=name: "connected; waiting" in said_by(coordinator, name), f"{name} to be connected", 120)
        yield


def said_by(coordinator: Coordinator, name: str) -> str:
    return (coordinator.home.root / f"{name}.log").read_text()


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
    site_files = [coordinator.site_file(name) for name in NAMES]
    assert_as_simulated(folder / "study.model.safetensors", study, site_files, tmp_path)


def test_a_second_study_runs_on_the_same_superlink_in_int8_and_equals_the_simulation(
    coordinator: Coordinator, sites: None, studies: dict[str, Study], tmp_path: Path
) -> None:
    home = str(coordinator.home.root)
    done = fl_server("run", str(coordinator.study("second")), "--home", home, "--json", timeout_s=240)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(record["round"], sorted(record["sites"])) for record in records] == [(1, list(NAMES)), (2, list(NAMES))]
    assert all(site["bytes_up"] < 0.5 * site["bytes_down"] for record in records for site in record["sites"].values())
    listed = json.loads(fl_server("list", "--home", home, "--json").stdout)
    assert (listed[0]["study"], listed[0]["status"], listed[0]["rounds_done"]) == ("second", "finished:completed", 2)
    complete = fl_server("run", str(coordinator.study("second")), "--home", home)
    assert complete.returncode == 0
    assert "second is complete" in complete.stdout
    assert len(json.loads(fl_server("list", "--home", home, "--json").stdout)) == len(listed)  # nothing was submitted
    folder = coordinator.home.runs / f"second-{studies['second'].digest[:12]}"
    site_files = [coordinator.site_file(name) for name in NAMES]
    assert_as_simulated(folder / "study.model.safetensors", studies["second"], site_files, tmp_path)


def test_a_run_that_fails_says_why_and_exits_with_one(coordinator: Coordinator, sites: None) -> None:
    home = str(coordinator.home.root)
    done = fl_server("run", str(coordinator.study("unknown")), "--home", home, timeout_s=240)
    assert done.returncode == 1
    for name in NAMES:
        assert f"ICM302 {name}: " in done.stderr
        assert f"ICM302 {name}: study is not approved at this site" in said_by(coordinator, name)
    assert "ICM507" in done.stderr
    assert "Traceback" not in done.stderr
    shown = json.loads(fl_server("status", "--home", home, "--json").stdout)
    assert [(row["study"], row["status"]) for row in shown] == [("unknown", "finished:failed")]
    gone = fl_server("stop", shown[0]["run"], "--home", home)
    assert gone.returncode == 1
    assert "ICM508" in gone.stderr


def test_a_revoked_site_is_told_so_and_what_to_do(coordinator: Coordinator, sites: None) -> None:
    assert fl_server("revoke", "hospitalC", "--home", str(coordinator.home.root)).returncode == 0
    wait_until(lambda: "ICM333" in said_by(coordinator, "hospitalC"), "the revoked site to be told", 90)
    said = said_by(coordinator, "hospitalC").splitlines()
    (told,) = [line for line in said if "ICM333" in line][:1]
    assert "site's key is not, or no longer, registered at the coordinator. Starting again in " in told
    assert "init --kit KIT --new-key" in told
    assert not [line for line in said if "ended with exit code" in line]
    assert "Traceback" not in "".join(said)
    assert all("ICM333" not in said_by(coordinator, name) for name in ("hospitalA", "hospitalB"))


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

"""Studies of a federation of real processes: to the end across a kill, one after the other, the bits those of the simulation."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from consortium import (
    BEHIND_NGINX,
    FL_SERVER,
    Coordinator,
    assert_as_simulated,
    children_of,
    environment,
    fl_server,
    running,
    wait_until,
)
from federated import NAMES, coordinator, end_and_leave_nothing, said_by, sites, studies

from icmoe.study import Study

__all__ = ["coordinator", "sites", "studies"]
pytestmark = [pytest.mark.network, BEHIND_NGINX]


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
    done = fl_server("run", str(coordinator.study("unapproved")), "--home", home, timeout_s=240)
    assert done.returncode == 1
    for name in NAMES:
        assert f"ICM302 {name}: " in done.stderr
        assert f"ICM302 {name}: study is not approved at this site" in said_by(coordinator, name)
    assert "ICM507" in done.stderr
    assert "Traceback" not in done.stderr
    shown = json.loads(fl_server("status", "--home", home, "--json").stdout)
    assert [(row["study"], row["status"]) for row in shown] == [("unapproved", "finished:failed")]
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


def test_a_coordinator_whose_superlink_was_killed_leaves_nothing_behind_either(coordinator: Coordinator) -> None:
    end_and_leave_nothing(coordinator)

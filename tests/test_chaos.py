"""A short bad day, by its seed; the long one is `python -m tests.chaos` (tests/chaos/README.md)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pytest
from chaos import clocks, disks, links
from chaos.campaign import Options, results, run
from chaos.events import BOTH, COORDINATOR, CYCLE, KINDS, LIAR, MALICIOUS, POISONED_ROUNDS, POISONS, SITES, plans
from chaos.judge import faults_of
from chaos.machines import Service, processes, services, until
from chaos.scene import why_not
from networks import hospital_networks, why_no_namespaces

SEED = int(os.environ.get("ICMOE_CHAOS_SEED", "11"))
needs_namespaces = pytest.mark.skipif(bool(why_no_namespaces()), reason=why_no_namespaces())
needs_disks = pytest.mark.skipif(bool(disks.why_no_disks()), reason=disks.why_no_disks())


def test_a_seed_draws_the_same_bad_days_and_every_kind_of_them() -> None:
    drawn = list(islice(plans(5), 2 * len(CYCLE)))
    assert drawn == list(islice(plans(5), 2 * len(CYCLE)))
    assert drawn != list(islice(plans(6), 2 * len(CYCLE)))
    kinds = {event.kind for plan in drawn for event in plan.events}
    assert kinds == {kind for some in KINDS.values() for kind in some}
    kills = [sum(event.kind in KINDS[family] for plan in drawn for event in plan.events) for family in (COORDINATOR, SITES)]
    assert kills[0] == kills[1] >= 20
    assert all(1 <= event.after_round < 10 for plan in drawn for event in plan.events)


def test_a_liar_lies_in_twelve_ways_and_never_three_rounds_in_a_row() -> None:
    first, second = [plan for plan in islice(plans(1), len(CYCLE)) if plan.family == MALICIOUS]
    assert sorted(event.kind for plan in (first, second) for event in plan.events) == sorted(POISONS)
    assert len(POISONS) == 12
    assert {event.site for event in first.events} == {LIAR}
    assert tuple(event.after_round + 1 for event in first.events) == POISONED_ROUNDS
    assert not any({number, number + 1, number + 2} <= set(POISONED_ROUNDS) for number in range(10))


HELD = {
    "finished": True,
    "finite": True,
    "quorum": True,
    "identical": False,
    "as_absent": True,
    "dice": 0.5,
    "calm_dice": 0.5,
    "missed": {"hospitalA": 1, "hospitalB": 0},
}


def test_what_is_wrong_with_a_result_is_said() -> None:
    refused = {"NaN": 504, "replay": 512}
    assert faults_of({**HELD, "family": SITES}) == []
    assert faults_of({**HELD, "family": MALICIOUS, "refused": refused}) == []
    assert faults_of({**HELD, "family": COORDINATOR}) == ["bits differ from the calm run"]
    assert faults_of({**HELD, "family": SITES, "missed": {"hospitalA": 0}}) != []
    assert faults_of({**HELD, "family": SITES, "finished": False}) == ["it did not finish"]
    assert len(faults_of({**HELD, "family": SITES, "finite": False, "quorum": False})) == 2
    assert faults_of({**HELD, "family": SITES, "events": [{"fault": "no process"}]}) == ["no process"]
    bad = {**HELD, "family": MALICIOUS, "refused": {**refused, "Inf": 0}, "as_absent": False, "dice": 0.52}
    assert len(faults_of(bad)) == 3


def test_a_service_is_started_again_and_nothing_of_it_is_left(tmp_path: Path) -> None:
    code = "import subprocess, time; subprocess.Popen(['sleep', '600']); time.sleep(600)"
    with services() as kept:
        service = Service("parent", [sys.executable, "-c", code], dict(os.environ), tmp_path / "log", restart_s=0.1)
        kept.start(service)
        until(lambda: service.find("sleep 600"), "a child", 20)
        before = set(processes(service.mark))
        service.process.kill()
        until(lambda: service.ends == [-9] and set(processes(service.mark)) - before, "a new start", 20)
        assert not before & set(processes(service.mark))
    assert processes(service.mark) == {}


def seconds_to_coordinator(cable, count: int) -> list[float]:
    """Round trips of a connection to a closed port of the coordinator."""
    look = (
        "s = socket.socket(); s.settimeout(3); t = time.monotonic(); s.connect_ex((sys.argv[1], 1)); print(time.monotonic() - t)"
    )
    code = "import socket, sys, time\nfor _ in range(int(sys.argv[2])):\n    " + look
    command = cable.inside(sys.executable, "-c", code, cable.here, str(count))
    return [float(line) for line in subprocess.run(command, capture_output=True, timeout=60, check=True).stdout.split()]


@pytest.mark.network
@needs_namespaces
def test_a_line_is_cut_bad_and_whole_again() -> None:
    with hospital_networks(1) as (cable,):
        assert max(seconds_to_coordinator(cable, 3)) < 0.2
        bad = links.BadLine(cable, 1)
        late = seconds_to_coordinator(cable, 40)
        bad.end()
        assert min(late) >= 2 * links.DELAY_S
        assert max(late) >= 2 * links.DELAY_S + 0.9  # TCP sends a lost opening again after one second
        links.cut(cable)
        assert min(seconds_to_coordinator(cable, 1)) >= 2.9
        links.heal(cable)
        assert min(seconds_to_coordinator(cable, 5)) < 0.2


@pytest.mark.network
@needs_namespaces
@pytest.mark.skipif(bool(links.why_not_slow()), reason=links.why_not_slow())
def test_a_slow_line_carries_a_megabyte_a_second() -> None:
    sender = "import socket, sys; s = socket.create_connection((sys.argv[1], int(sys.argv[2]))); s.sendall(bytes(3_000_000))"
    with hospital_networks(1) as (cable,):
        links.slow(cable)
        import socket

        with socket.create_server((cable.here, 0)) as server:
            command = cable.inside(sys.executable, "-c", sender, cable.here, str(server.getsockname()[1]))
            with subprocess.Popen(command), server.accept()[0] as connection:
                began, count = time.monotonic(), 0
                while part := connection.recv(65536):
                    count += len(part)
        assert count == 3_000_000
        assert 2.0 < time.monotonic() - began < 8.0
        links.fast(cable)


@needs_disks
def test_a_full_disk_is_full_to_its_last_byte(tmp_path: Path) -> None:
    with disks.mounted(tmp_path / "disk", 2**20):
        disks.fill(tmp_path / "disk")
        with pytest.raises(OSError, match="No space"):
            (tmp_path / "disk" / "one").write_bytes(b"x")
        disks.make_room(tmp_path / "disk")
        (tmp_path / "disk" / "one").write_bytes(b"x")


@pytest.mark.skipif(bool(clocks.why_not()), reason=clocks.why_not())
def test_a_clock_is_wrong_and_waits_are_not(tmp_path: Path) -> None:
    code = "import time; began = time.monotonic(); time.sleep(0.3); print(time.time(), time.monotonic() - began)"
    settings = {**os.environ, **clocks.settings(tmp_path / "clock")}
    for shift, ahead_s in ((clocks.RIGHT, 0), ("+1h", 3600), ("-1h", -3600)):
        clocks.set_clock(tmp_path / "clock", shift)
        done = subprocess.run([sys.executable, "-c", code], env=settings, capture_output=True, timeout=60, check=True)
        now, waited_s = map(float, done.stdout.split())
        assert abs(now - time.time() - ahead_s) < 30
        assert 0.25 < waited_s < 10


@pytest.mark.network
@pytest.mark.slow
def test_a_short_bad_day(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A kill of the coordinator and one of a hospital in one study; the long form has all kinds and ten rounds."""
    if reason := why_not():
        pytest.skip(reason)
    options = Options(SEED, tmp_path, studies=1, rounds=4, cycle=(BOTH,))
    code = run(options)
    (calm, row) = results(tmp_path)
    assert code == 0, json.dumps(row, indent=1) + capsys.readouterr().out
    assert row["identical"]
    assert all(event["kind"] in KINDS[family] for event, family in zip(row["events"], (COORDINATOR, SITES), strict=True))
    assert all(1 <= event["after_round"] < 4 for event in row["events"])
    assert row["repeated"] <= 2
    assert calm["finished"]
    assert run(options) == 0  # what is done is not done again
    assert len(results(tmp_path)) == 2

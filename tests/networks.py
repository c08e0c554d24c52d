"""Hospitals in network namespaces of their own, each on a cable to one switch, for tests that look at or cut the wire."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

IP = shutil.which("ip", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"]))


def ip(*words: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([str(IP), *words], capture_output=True, timeout=20, check=False)


def why_no_namespaces() -> str:
    """Why there are no namespaces here; empty where there are."""
    if IP is None:
        return "ip is not installed (apt-get install iproute2)"
    name = f"icmoe-probe-{os.getpid()}"
    made = ip("netns", "add", name).returncode == 0
    ip("netns", "del", name)
    return "" if made else "network namespaces are not permitted here"


@dataclass(frozen=True)
class Cable:
    """A hospital's namespace, on one switch with this one and the other hospitals."""

    namespace: str
    here: str
    there: str
    device: str
    port: str
    switch: str

    def inside(self, *words: str) -> list[str]:
        return [str(IP), "netns", "exec", self.namespace, *words]


class CannotLay(Exception):
    """A cable could not be laid."""


@contextmanager
def hospital_networks(count: int) -> Iterator[list[Cable]]:
    number = os.getpid() % 200
    switch, here = f"ic{number}", f"10.213.{number}.1"
    cables = [
        Cable(f"icmoe-{os.getpid()}-{k}", here, f"10.213.{number}.{k + 2}", f"ic{number}n{k}", f"ic{number}p{k}", switch)
        for k in range(count)
    ]
    commands = [
        ["link", "add", switch, "type", "bridge"],
        ["addr", "add", f"{here}/24", "dev", switch],
        ["link", "set", switch, "up"],
    ]
    for cable in cables:
        pair = ["type", "veth", "peer", "name", cable.device, "netns", cable.namespace]
        commands += [
            ["netns", "add", cable.namespace],
            ["link", "add", cable.port, "master", switch, *pair],
            ["link", "set", cable.port, "up"],
            ["-n", cable.namespace, "addr", "add", f"{cable.there}/24", "dev", cable.device],
            *(["-n", cable.namespace, "link", "set", device, "up"] for device in ("lo", cable.device)),
        ]
    try:
        for command in commands:
            done = ip(*command)
            if done.returncode != 0:
                raise CannotLay(f"ip {' '.join(command)}: {done.stderr.decode().strip()}")
        yield cables
    finally:
        ip("link", "del", switch)
        for cable in cables:
            ip("netns", "del", cable.namespace)


def remove_left_behind() -> None:
    """Remove namespaces and switches of a process that was killed before it could."""
    for line in ip("netns", "list").stdout.decode().splitlines():
        words = line.split(maxsplit=1)[0].split("-")
        if words[0] == "icmoe" and len(words) == 3 and words[1].isdigit() and not Path(f"/proc/{words[1]}").exists():
            ip("link", "del", f"ic{int(words[1]) % 200}")
            ip("netns", "del", "-".join(words))

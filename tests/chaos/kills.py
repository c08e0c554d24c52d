"""kill -9 and SIGSTOP, by what a process is."""

from __future__ import annotations

import signal

from .machines import Service, signal_all, until
from .scene import Scene

FOUND_S = 120.0
MAIN = ""  # the process that the service itself started

# Service and word in the command line; a hospital's service has the hospital's name.
COORDINATOR = {
    "kill flower-superlink": ("superlink", "/flower-superlink "),
    "kill flower-superexec": ("superlink", "/flower-superexec "),
    "kill ServerApp": ("superlink", "/flwr-serverapp "),
    "kill fl_server run": ("run", MAIN),
    "kill fl_server superlink": ("superlink", MAIN),
    "kill nginx": ("proxy", MAIN),
}
SITE = {
    "kill fl_client": MAIN,
    "kill SuperNode": "fl_client.supernode ",
    "kill a site's SuperExec": "/flower-superexec ",
    "kill ClientApp": "/flwr-clientapp ",
}


def found(service: Service, word: str) -> list[int]:
    if word == MAIN:
        return [] if service.process is None or service.process.poll() is not None else [service.process.pid]
    return service.find(word)


def signal_one(scene: Scene, name: str, word: str, number: signal.Signals) -> list[int]:
    """Send the signal as soon as there is such a process; returns who got it."""
    service = scene.services[name]
    until(lambda: not service.wanted or found(service, word), f"{name}: a process {word}", FOUND_S)
    pids = found(service, word)[-1:]
    signal_all(pids, number)
    return pids


def kill(scene: Scene, kind: str, site: str) -> None:
    name, word = COORDINATOR[kind] if kind in COORDINATOR else (site, SITE[kind])
    signal_one(scene, name, word, signal.SIGKILL)


def freeze(scene: Scene, site: str, word: str) -> list[int]:
    return signal_one(scene, site, word, signal.SIGSTOP)


def thaw(pids: list[int]) -> None:
    signal_all(pids, signal.SIGCONT)

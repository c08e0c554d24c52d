"""Flower's own processes on loopback: the site runs its installed package and nothing else, whatever is shipped to it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from consortium import flwr, listens, make_home, serving, write_key_pair
from test_client import command, write_site_file, write_study_file

from fl_client.audit import read_log
from fl_client.supervisor import Hearing, end_group, start_supernode
from fl_server.home import CONNECTION, Home
from icmoe.bundle import bundle_files
from icmoe.study import Study
from simulations.phantoms import PhantomSite, write_phantoms

ROOT = Path(__file__).resolve().parents[1]


def wait_for(what: Callable[[], object], seconds: float, why: str, every_s: float = 0.2) -> object:
    ends = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < ends, f"not within {seconds} s: {why}"
        time.sleep(every_s)
    return found


@dataclass
class Coordinator:
    """The coordinator's own SuperLink on loopback, and the flwr command beside it."""

    home: Home

    def flwr(self, *words: str) -> str:
        done = flwr(self.home.flower, *words)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def flags(self, site: str, key: Path) -> list[str]:
        """Register a site's key and return how its SuperNode gets in."""
        self.flwr("supernode", "register", f"{write_key_pair(key).with_suffix('.pub')}", CONNECTION, "--name", site)
        trust = ["--root-certificates", str(self.home.ca), "--auth-supernode-private-key", str(key)]
        return ["--superlink", self.home.superlink, *trust]

    def run(self, name: str, study: Path, **changes: bytes) -> int:
        """Submit the installed package's bundle, some files changed, as a hostile or careless coordinator might."""
        app = self.home.root / name
        for file, content in {**bundle_files(), **changes}.items():
            (app / file).parent.mkdir(parents=True, exist_ok=True)
            (app / file).write_bytes(content)
        done = json.loads(self.flwr("run", str(app), CONNECTION, "--run-config", f'study="{study}"', "--format", "json"))
        return int(done["run-id"])

    def ended(self, run: int) -> str:
        rows = json.loads(self.flwr("list", CONNECTION, "--run-id", str(run), "--format", "json"))["runs"]
        return str(rows[0]["status"]) if str(rows[0]["status"]).startswith("finished") else ""

    def outcome(self, run: int, seconds: float) -> str:
        """How a run ended. The log says when, for nothing; Flower's command says how, for seconds of a processor."""
        over = re.compile(rf"(Finished|Failed to finish) task \d+ of run {run}\b")
        wait_for(lambda: over.search(self.log()), seconds, f"the end of run {run}")
        return str(wait_for(lambda: self.ended(run), 60, f"the status of run {run}", every_s=2.0))

    def log(self) -> str:
        return (self.home.root / "link.log").read_text(errors="replace")


@dataclass
class Hospital:
    """A site with phantom data, one approved study, features in the cache."""

    folder: Path
    study: Study
    said: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def prepare(self) -> None:
        sites = [PhantomSite(name="Alder", train_patients=2, val_patients=1, test_patients=1)]
        write_phantoms(self.folder / "export", seed=1, size_px=32, sites=sites)
        self.path = write_site_file(self.folder, self.folder / "export")
        self.study_file = write_study_file(self.folder / "study.toml", self.study)
        for words in (["approve", str(self.study_file), "--yes"], ["prepare"]):
            done = command(self.path, *words)
            assert done.exit_code == 0, done.output

    def start(self, coordinator: Coordinator) -> subprocess.Popen[str]:
        flags = coordinator.flags("Alder", self.folder / "node.key")
        child = start_supernode(self.path, self.folder / "state", flags)
        hear = Hearing(self.said.append, self.lines.append)
        threading.Thread(target=lambda: [hear(line) for line in child.stdout or ()], daemon=True).start()
        return child


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[Coordinator]:
    home = make_home(tmp_path / "coordinator", "Alder")
    with serving(home, home.root / "link.log"):
        wait_for(lambda: listens(home.superlink_port), 60, "SuperLink on its port")
        yield Coordinator(home)


@pytest.fixture
def hospital(tmp_path: Path, make_study, monkeypatch: pytest.MonkeyPatch) -> Hospital:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    site = Hospital(tmp_path / "hospital", make_study(rounds=1, quorum=1, retries=0, deadline_s=45.0))
    site.folder.mkdir()
    site.prepare()
    return site


MISHAPS = """
import sys
from pathlib import Path

# Runs first in every Python process of the site: the first ClientApp that finds the file has the mishap.
mark = Path({mark!r})
kind = mark.read_text() if mark.exists() and any("flwr-clientapp" in word for word in sys.orig_argv) else ""
if kind == "hang":
    import ctypes

    import icmoe.training

    def hang(*_, **__):
        mark.unlink()
        ctypes.PyDLL(None).sleep(600)  # a C call that keeps the interpreter's lock

    icmoe.training.train_round = hang
elif kind == "import":
    mark.unlink()
    sys.modules["icmoe.training"] = None  # importing it raises, outside of all that the site's own code could catch
"""


@pytest.mark.slow
@pytest.mark.parametrize("mishap", ["hang", "import"])
def test_after_a_mishap_outside_our_code_the_next_run_is_served_and_no_text_has_left(
    mishap: str, coordinator: Coordinator, hospital: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark, code = hospital.folder / "mishap", hospital.folder / "code"
    code.mkdir()
    mark.write_text(mishap)
    (code / "sitecustomize.py").write_text(MISHAPS.format(mark=str(mark)))
    monkeypatch.setenv("PYTHONPATH", f"{code}{os.pathsep}{ROOT}")
    child = hospital.start(coordinator)
    try:
        wait_for(lambda: hospital.said, 60, "connection")
        first = coordinator.run("first", hospital.study_file)
        assert coordinator.outcome(first, 240) == "finished:failed"
        assert not mark.exists()
        told = " ".join(coordinator.flwr("log", str(first), CONNECTION, "--show").split())
        if mishap == "import":
            assert "ICM304 Alder: site did not finish its part of a round" in told
            assert "icmoe.training" in " ".join(hospital.lines)
            assert "halted" not in told + coordinator.log()
        second = coordinator.run("second", hospital.study_file)
        assert coordinator.outcome(second, 240) == "finished:completed", hospital.lines
        assert any("ICM323" in line for line in hospital.said) == (mishap == "hang")
    finally:
        end_group(child)


def test_the_approved_bundle_runs_and_another_is_refused_at_both_ends(coordinator: Coordinator, hospital: Hospital) -> None:
    child = hospital.start(coordinator)
    try:
        wait_for(lambda: hospital.said, 60, "connection")
        doctored = bundle_files()["fl_client/app.py"] + b"\n# one more line\n"
        refused = coordinator.run("doctored", hospital.study_file, **{"fl_client/app.py": doctored})
        assert coordinator.outcome(refused, 120) == "finished:failed"
        told = coordinator.flwr("log", str(refused), CONNECTION, "--show")
        assert "ICM317 Alder: app bundle differs from the site's installed package" in " ".join(told.split())
        assert any("ICM317" in line and "fl_client/app.py" in line for line in hospital.said)

        before = len(read_log(hospital.folder / "state"))
        run = coordinator.run("honest", hospital.study_file)
        assert coordinator.outcome(run, 180) == "finished:completed", coordinator.log()[-3000:] + "\n".join(hospital.lines)
        events = [(entry["event"], entry["kind"]) for entry in read_log(hospital.folder / "state")[before:]]
        assert events[:2] == [("sent", "site"), ("declined", "summary")]
        assert events[2:5] == [("received", "train"), ("spent", "train"), ("sent", "train")]
        assert events[5:] == [("received", "evaluate"), ("sent", "evaluate")]
        assert hospital.study_file.with_suffix(".model.safetensors").exists()
    finally:
        end_group(child)

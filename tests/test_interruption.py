"""A rehearsal, an ablation and the evidence on a bad day: interrupted, or on a machine where Ray does not start."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from simulations.federation import Engine, engine_fault
from simulations.phantoms import PhantomSite, write_phantoms

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "COLUMNS": "200", "PYTHONPATH": str(ROOT)}
FEW = {"train_patients": 1, "val_patients": 1, "test_patients": 1, "slices_per_patient": 1}
WAITING = """
import sys, time
from simulations.interruption import exit_on_interruption
with exit_on_interruption("Go on so."):
    print("begun", flush=True)
    {work}
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_says_how_to_go_on(sent: signal.Signals) -> None:
    code = WAITING.format(work="time.sleep(300)")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, text=True, **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        process.send_signal(sent)
        said = process.communicate(timeout=60)[1]
    assert (process.returncode, said) == (130, "ICM503 interrupted. Finished rounds are kept. Go on so.\n")


IMPATIENT = """
import os, signal, sys, time
from simulations.interruption import exit_on_interruption
class Again:
    def __init__(self, stream): self.stream = stream
    def __getattr__(self, name): return getattr(self.stream, name)
    def write(self, text):
        os.kill(os.getpid(), {sent})
        return self.stream.write(text)
sys.stderr = Again(sys.stderr)
with exit_on_interruption("Go on so."):
    os.kill(os.getpid(), {sent})
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_who_interrupts_again_while_it_ends_takes_nothing_from_what_is_said(sent: signal.Signals) -> None:
    words = [sys.executable, "-c", IMPATIENT.format(sent=int(sent))]
    done = subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (130, "ICM503 interrupted. Finished rounds are kept. Go on so.\n")


@pytest.mark.parametrize(("code", "expected"), [(int(signal.SIGTERM), 130), (1, 1)])
def test_rays_own_word_of_a_signal_is_an_interruption_and_another_exit_is_none(code: int, expected: int) -> None:
    words = [sys.executable, "-c", WAITING.format(work=f"sys.exit({code})")]
    done = subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, "ICM503" in done.stderr) == (expected, expected == 130)


def children_of(pid: int) -> list[int]:
    """Return the processes that a process has started; none where it is gone."""
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def test_interrupted_rivals_end_at_once_and_take_their_process_along(tmp_path: Path) -> None:
    write_phantoms(tmp_path / "data", seed=1, size_px=32, sites=[PhantomSite(name="Elm", **FEW)])
    words = ["-m", "simulations.evidence.rivals", "--methods", "mask-head", "--regimes", "fedavg"]
    command = [sys.executable, *words, "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    deadline, children = time.monotonic() + 300, []
    with subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as process:
        while len(children) < 2 and time.monotonic() < deadline:  # the job's, and the one that tracks what they share
            time.sleep(0.05)
            children = children_of(process.pid)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=120)[1]
    assert process.returncode == 130
    assert "ICM503 interrupted. Finished rounds are kept. Start again to go on.\n" in said
    while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{child}").exists() for child in children)


def test_where_ray_cannot_start_a_command_ends_with_one_line(tmp_path: Path) -> None:
    sites = [PhantomSite(name="Elm", **FEW)]
    write_phantoms(tmp_path / "data", seed=1, size_px=32, sites=sites)
    scenario = tmp_path / "tiny.toml"
    scenario.write_text('[study]\ntest_only = true\n[study.backbone]\nname = "sam-vit-test"\nimage_size = 32\n')
    options = ["--only", "full", "--data", str(tmp_path / "data"), "--scenario", str(scenario), "--out", str(tmp_path / "out")]
    command = [sys.executable, str(ROOT / "simulations" / "ablation.py"), *options]
    places = {"RAY_TMPDIR": "/proc/nowhere", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(command, env={**ENVIRONMENT, **places}, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(
        "ICM503 Ray did not start, or broke down: [Errno 2] No such file or directory: '/proc/nowhere'."
    )
    assert "Traceback" not in done.stdout + done.stderr


def test_a_cluster_that_turns_a_rehearsal_away_is_told_apart_from_a_ray_that_breaks_down() -> None:
    wrapped = RuntimeError("Ending simulation.")
    wrapped.__cause__ = ConnectionError("nobody\nat home")
    assert engine_fault(wrapped, Engine(address="10.0.0.1:6379")).number == 505
    there = engine_fault(wrapped, Engine())
    assert (there.number, there.value) == (503, "nobody")

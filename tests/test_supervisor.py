"""The supervisor with real child processes: restarts, sentences, stopping, nothing left behind, hung C code ended."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hospitals import Hospital
from hypothesis import given
from hypothesis import strategies as st
from test_client import command

from fl_client.own_lines import TAG
from fl_client.site import ENVIRONMENT, SiteFile
from fl_client.supervisor import (
    KEY_NOT_KNOWN,
    SUPEREXEC_GONE,
    Hearing,
    child_environment,
    connection_flags,
    end_group,
    only_one,
    sentence_of,
)
from icmoe.config import parse
from icmoe.errors import CATALOGUE, IcmoeError
from icmoe.processes import free_port, next_delay

pytest_plugins = ["hospitals"]

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.timeout(120)
ENV = {**os.environ, "PYTHONPATH": str(ROOT)}

# A supervisor of a fake SuperNode: a script that may have its own child, as Flower's has.
SUPERVISOR = """
import subprocess, sys
from fl_client.supervisor import supervise
def start():
    return subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            start_new_session=True)
supervise(start, lambda line: print("heard", line, end="", flush=True), lambda line: print("said", line, flush=True))
print("left", flush=True)
"""
FAMILY = """
import os, subprocess, sys, time
deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE)
child.stdout.readline()
print("pids", os.getpid(), child.pid, flush=True)
{then}
"""
# A process that hangs in C, tied to its parent, which says its number and waits for it.
PARENT = """
import os, subprocess, sys
if sys.argv[1:]:
    import ctypes
    from fl_client.watchdog import end_with_parent
    end_with_parent(os.getppid())
    print("tied", flush=True)
    ctypes.PyDLL(None).sleep(600)
child = subprocess.Popen([sys.executable, __file__, "child"], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
child.wait()
"""


def start_supervisor(script: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", SUPERVISOR, script], stdout=subprocess.PIPE, text=True, env=ENV)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def within(seconds: float, what: Callable[[], bool]) -> bool:
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        if what():
            return True
        time.sleep(0.05)
    return False


def pids_of(line: str) -> list[int]:
    assert line.startswith("heard pids"), line
    return [int(word) for word in line.split()[2:]]


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


@pytest.mark.parametrize("code", [0, 1, 305 % 256])
def test_any_exit_is_followed_by_another_start(code: int) -> None:
    process = start_supervisor(f"import sys; print('born', flush=True); sys.exit({code})")
    try:
        lines = [read_line(process) for _ in range(4)]
    finally:
        process.kill()
        process.wait(timeout=10)
    assert [line.split()[0] for line in lines] == ["heard", "said", "heard", "said"]
    assert ("ICM324 the coordinator turned the site away" if code == 0 else f"with exit code {code}.") in lines[1]


def test_a_key_that_the_coordinator_does_not_know_is_said_with_the_remedy_at_the_site() -> None:
    process = start_supervisor(f"import sys; print('born', flush=True); sys.exit({KEY_NOT_KNOWN})")
    try:
        said = [read_line(process) for _ in range(2)][1]
    finally:
        process.kill()
        process.wait(timeout=10)
    assert "ICM333 site's key is not, or no longer, registered at the coordinator. Starting again in 1 s." in said
    assert "init --kit KIT --new-key" in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_whole_family_within_seconds(number: signal.Signals) -> None:
    process = start_supervisor(FAMILY.format(then="time.sleep(600)"))
    pids = pids_of(read_line(process))
    assert all(map(alive, pids))
    began = time.monotonic()
    process.send_signal(number)
    rest, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert rest.endswith("left\n")
    assert time.monotonic() - began < 10
    assert within(2, lambda: not any(map(alive, pids)))  # also the one that ignores SIGTERM


def test_what_a_dead_child_left_running_is_ended_before_the_next_start() -> None:
    process = start_supervisor(FAMILY.format(then="sys.exit(1)"))
    try:
        first = pids_of(read_line(process))
        assert "exit code 1" in read_line(process)
        assert within(2, lambda: not any(map(alive, first)))
    finally:
        process.terminate()
        process.wait(timeout=20)


def test_a_killed_supervisor_leaves_no_supernode_behind(tmp_path: Path) -> None:
    site = tmp_path / "site.toml"
    site.write_text('name = "Alder"\ndata = "x"\n')
    port = free_port()  # nobody listens there: the SuperNode keeps trying
    script = f"""
import sys, time
from pathlib import Path
from fl_client.supervisor import start_supernode
child = start_supernode(Path({str(site)!r}), Path({str(tmp_path / "state")!r}), ["--superlink", "127.0.0.1:{port}", "--insecure"])
print(child.pid, flush=True)
for line in child.stdout:
    print(line, end="", flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=ENV)
    supernode = int(read_line(process))
    try:
        # On a slow machine lines of its tries to connect come first.
        assert any("Starting Flower SuperExec" in read_line(process) for _ in range(100))
        group = group_of(supernode)
        assert len(group) >= 2
        process.kill()
        process.wait(timeout=10)
        assert within(15, lambda: not any(map(alive, group)))
    finally:
        process.kill()
        for pid in group_of(supernode):
            os.kill(pid, signal.SIGKILL)


def group_of(leader: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and alive(int(entry.name)):
            try:
                if os.getpgid(int(entry.name)) == leader:
                    found.append(int(entry.name))
            except ProcessLookupError:
                continue
    return found


HANGS = {
    "a C call that keeps the interpreter": "import ctypes; ctypes.PyDLL(None).sleep(600)",
    "a regular expression without end": "import re; re.match(r'(a+)+$', 'a' * 64 + 'b')",
}


@pytest.mark.parametrize("hang", HANGS)
def test_the_watchdog_ends_code_that_never_lets_go_of_the_interpreter(hang: str) -> None:
    code = f"from fl_client.watchdog import end_after; end_after(60); end_after(1.0)\n{HANGS[hang]}"
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], env=ENV, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert time.monotonic() - began < 30
    assert done.stderr.startswith("Timeout (0:00:01)!")
    assert "ICM323" in str(sentence_of(done.stderr.splitlines()[0]))


def test_a_hung_process_dies_with_its_parent(tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text(PARENT)
    parent = subprocess.Popen([sys.executable, str(tmp_path / "parent.py")], stdout=subprocess.PIPE, text=True, env=ENV)
    pid = int(read_line(parent))
    assert alive(pid)
    parent.kill()
    parent.wait(timeout=10)
    assert within(5, lambda: not alive(pid))


WITH_CHILD = """
import signal, subprocess, sys, time
from fl_client.watchdog import end_with_child
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
gone = end_with_child("flower-superexec")
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", "flower-superexec"])
print(child.pid, flush=True)
try:
    time.sleep(60)
except SystemExit:
    sys.exit(7 if gone.is_set() else 0)
"""


@pytest.mark.parametrize("wait", ["time.sleep(60)", "child.wait(); time.sleep(60)"])
def test_a_process_ends_with_the_child_without_which_it_does_nothing(wait: str) -> None:
    code = WITH_CHILD.replace("time.sleep(60)", wait)
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=ENV)
    pid = int(read_line(parent))
    time.sleep(3)
    assert parent.poll() is None
    os.kill(pid, signal.SIGKILL)
    assert parent.wait(timeout=20) == 7


def test_a_site_without_its_superexec_is_told_what_is_missing() -> None:
    process = start_supervisor(f"import sys; print('born', flush=True); sys.exit({SUPEREXEC_GONE})")
    try:
        said = [read_line(process) for _ in range(2)][1]
    finally:
        process.kill()
        process.wait(timeout=10)
    assert "ICM324 Flower's SuperExec at this site ended, which starts the training: killed, or short of memory." in said


@given(lives=st.lists(st.floats(0, 1000), max_size=30))
def test_the_delay_grows_to_fifteen_seconds_and_falls_to_one_after_a_long_life(lives: list[float]) -> None:
    delay = 0.0
    for life in lives:
        before, delay = delay, next_delay(delay, life)
        assert 1.0 <= delay <= 15.0
        assert delay == 1.0 if life >= 120.0 else delay >= before


def test_flowers_lines_become_sentences_said_once_and_all_are_kept() -> None:
    said: list[str] = []
    kept: list[str] = []
    hearing = Hearing(said.append, kept.append)
    lines = [
        "\x1b[92mINFO \x1b[0m:      SuperNode ID: 5",
        "\x1b[93mWARNING \x1b[0m:   Connection attempt failed, retrying in 0.51 seconds",
        "\x1b[93mWARNING \x1b[0m:   Connection attempt failed, retrying in 1.71 seconds",
        f"{TAG} ICM302 Alder: study is not approved at this site: 0000.",
        "[code: 20] Node is active.",
        "[code: 2004] Failed to activate SuperNode.",
        "Traceback (most recent call last):",
    ]
    for line in lines:
        hearing(line + "\n")
    assert len(kept) == len(lines)
    assert said == [
        "connected; waiting for the coordinator to ask",
        "the coordinator does not answer; trying again",
        "ICM302 Alder: study is not approved at this site: 0000.",
        f"ICM324 the coordinator refused the connection: Node is active. {CATALOGUE[324].remedy}",
        "ICM324 the coordinator does not let the site in: its key is not admitted, or its last connection runs out first (60 s). "
        + CATALOGUE[324].remedy,
    ]


def test_the_child_sees_no_telemetry_no_updates_no_installation_and_the_sites_own_folder(tmp_path: Path) -> None:
    env = child_environment(tmp_path / "a.toml", tmp_path / "state", {"NO_PROXY": "pacs", "HTTPS_PROXY": "http://proxy:1"})
    assert env["FLWR_TELEMETRY_ENABLED"] == "0"
    assert env["FLWR_DISABLE_UPDATE_CHECK"] == env["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    assert env["FLWR_HOME"] == str(tmp_path / "state/flower")
    assert env[ENVIRONMENT] == str(tmp_path / "a.toml")
    assert float(env["FLWR_SUPEREXEC_TASK_POLL_INTERVAL"]) < 1.0
    assert env["NO_PROXY"] == env["no_proxy"] == "pacs,127.0.0.1,localhost"
    assert env["MALLOC_ARENA_MAX"] == "2"
    chosen = child_environment(tmp_path / "a.toml", tmp_path / "state", {"MALLOC_ARENA_MAX": "8"})
    assert chosen["MALLOC_ARENA_MAX"] == "8"
    assert (Path(env["PATH"].split(os.pathsep)[0]) / "flower-superexec").exists()


def test_the_flags_name_coordinator_authority_and_key_from_the_site_file(tmp_path: Path) -> None:
    values = {"name": "A", "data": "x", "coordinator": {"address": "c.example:443", "ca": "A/ca.crt", "key": "A/node.key"}}
    flags = connection_flags(tmp_path / "A.toml", parse(SiteFile, values, where="A.toml"))
    ca, key = str(tmp_path / "A/ca.crt"), str(tmp_path / "A/node.key")
    assert flags == ["--superlink", "c.example:443", "--root-certificates", ca, "--auth-supernode-private-key", key]
    with pytest.raises(IcmoeError, match=r"ICM203 .*\[coordinator\]"):
        connection_flags(tmp_path / "A.toml", parse(SiteFile, {"name": "A", "data": "x"}, where="A.toml"))


def test_a_site_runs_once_at_a_time(tmp_path: Path) -> None:
    with only_one(tmp_path), pytest.raises(IcmoeError, match=r"ICM325 .*the site is running already"), only_one(tmp_path):
        pass
    with only_one(tmp_path):
        pass


def test_without_approval_or_coordinator_the_command_says_so_and_starts_nothing(tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    path.write_text('name = "Alder"\ndata = "x"\n')
    done = command(path)
    assert done.exit_code == 1
    assert "ICM316" in done.stderr
    assert "Traceback" not in done.stderr + done.output


def test_the_command_does_not_start_what_somebody_at_the_site_must_put_right(hospital: Hospital) -> None:
    hospital.text = re.sub("data = .*", 'data = "nowhere"', hospital.text)
    hospital.at(free_port())
    hospital.key.chmod(0o644)
    done = command(hospital.path)
    assert done.exit_code == 1
    assert {line[:6] for line in done.stderr.splitlines() if line.startswith("ICM")} == {"ICM109", "ICM306"}
    assert "connecting" not in done.stderr
    before = os.umask(0o022)
    os.umask(before)
    assert before != 0o077, "what else this process writes is as it was"


def test_the_command_says_what_it_waits_for_and_leaves_when_asked(hospital: Hospital) -> None:
    port = free_port()  # nobody listens there
    path = hospital.at(f"127.0.0.1:{port}").path
    program = str(Path(sys.executable).parent / "fl_client")
    line = [program, "--site", "Alder", "--config", str(path)]
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env={**ENV, "COLUMNS": "300"})
    try:
        assert process.stderr is not None
        said = [process.stderr.readline() for _ in range(4)]
        assert "approved: tiny" in said[0]
        assert "ICM311" in said[1]  # the preflight's word; it may come right by itself
        assert f"connecting to 127.0.0.1:{port}" in said[2]
        assert "the coordinator does not answer; trying again" in said[3]
        second = subprocess.run(line, capture_output=True, text=True, timeout=60, env=ENV)
        assert second.returncode == 1
        assert "ICM325" in second.stderr
        process.terminate()
        _, rest = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 0
    assert rest.splitlines()[-1].endswith("Alder: left the federation")
    assert "Traceback" not in rest
    log = hospital.folder / "state/supernode.log"
    assert "Connection attempt failed" in log.read_text()
    assert log.stat().st_mode & 0o077 == 0


def test_the_supervisor_and_its_child_do_without_pytorch() -> None:
    code = "import sys, fl_client.supervisor, fl_client.supernode; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env=ENV)


def test_ending_a_group_that_is_gone_is_no_error() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""], text=True, start_new_session=True)
    child.wait(timeout=20)
    end_group(child)

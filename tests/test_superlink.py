"""The coordinator's commands and its supervisor: what is printed, what is refused, what is started again."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from consortium import FL_SERVER, ROOT, environment, fl_server, make_home, running, wait_until
from flwr.superlink.routers.fleet.router import router
from typer.testing import CliRunner

from fl_server import cli, flower
from fl_server.beside import waiting_path
from fl_server.home import Home
from fl_server.new_study import study_toml
from fl_server.submit import StudyFolder, dice_sentence, folder_of, sentence, start, write_app
from fl_server.superlink import FLEET_CALLS, nginx_configuration, superexec_command, superlink_command
from icmoe.bundle import bundle_files
from icmoe.errors import IcmoeError
from icmoe.study import read_study


def test_the_printed_commands_are_stock_flower_on_loopback_with_every_lock_on(tmp_path: Path) -> None:
    home = make_home(tmp_path)
    done = fl_server("superlink", "--home", str(tmp_path))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "export FLWR_TELEMETRY_ENABLED=0" in lines
    assert "export FLWR_DISABLE_UPDATE_CHECK=1" in lines
    assert f"export FLWR_HOME={tmp_path}/coordinator/flwr" in lines
    superlink, superexec = (shlex.split(line.removesuffix(" &")) for line in lines if " --superexec-auth-secret-file " in line)
    assert (superlink, superexec) == (superlink_command(home), superexec_command(home))
    options = dict(zip(superlink[1:-2:2], superlink[2:-2:2], strict=True))
    assert options["--host"] == "127.0.0.1"
    assert options["--isolation"] == "process"
    assert options["--database"] == str(home.database)
    assert {"--enable-supernode-auth", "--disable-runtime-dependency-installation"} == set(superlink[-2:])
    assert "--insecure" not in superlink + superexec
    assert Path(superlink[0]).is_file()
    assert 'address = "127.0.0.1:' in (home.folder / "flwr" / "config.toml").read_text()


def test_the_proxy_forwards_the_calls_of_a_registered_node_and_no_other(tmp_path: Path) -> None:
    offered = {route.path for route in router.routes}
    forwarded = {f"/v1/fleet/{call}" for call in FLEET_CALLS}
    assert offered - forwarded == {"/v1/fleet/register-node", "/v1/fleet/unregister-node"}
    assert forwarded < offered
    text = nginx_configuration(make_home(tmp_path))
    assert text.count("proxy_pass") == 1
    assert "deny" not in text  # it would answer 403, which Flower takes for its own


@pytest.mark.parametrize("name", ['a "b"', "a \\ b;", "Ünïcode 😀"])
def test_a_home_of_an_odd_name_is_written_down_whole(name: str, tmp_path: Path) -> None:
    home = make_home(tmp_path / name)
    done = CliRunner().invoke(cli.app, ["superlink", "--home", str(home.root)])
    assert done.exit_code == 0, done.output
    found = tomllib.loads((home.folder / "flwr" / "config.toml").read_text())
    assert found["superlink"]["coordinator"]["root-certificates"] == str(home.ca)
    if nginx := shutil.which("nginx"):
        asked = subprocess.run([nginx, "-t", "-e", "stderr", "-c", home.proxy / "nginx.conf"], capture_output=True, text=True)
        assert "test is successful" in asked.stderr, asked.stderr


@pytest.mark.parametrize("name", ["$HOME", "a\nb", "a\udcff"])
def test_a_home_that_nginx_cannot_name_is_refused(name: str, tmp_path: Path) -> None:
    home = make_home(tmp_path / name)
    done = CliRunner().invoke(cli.app, ["superlink", "--home", str(home.root)])
    assert (done.exit_code, done.stderr[:15]) == (1, "ICM202 --home: "), done.output
    assert not (home.proxy / "nginx.conf").exists()


BAD_HOMES = {
    "no provisioned folder": (lambda home: (home / "consortium.toml").unlink(), "ICM205"),
    "no certificate": (lambda home: (home / "coordinator" / "server.crt").unlink(), "ICM326"),
    "a key that others may read": (lambda home: (home / "coordinator" / "server.key").chmod(0o644), "ICM306"),
    "a port out of range": (lambda home: rewrite(home, "superlink_port = ", "superlink_port = 9"), "ICM202"),
    "no address": (lambda home: rewrite(home, "address", "adress"), "ICM203"),
}


def rewrite(home: Path, old: str, new: str) -> None:
    path = home / "consortium.toml"
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize("name", BAD_HOMES)
def test_a_folder_that_is_not_provisioned_is_refused_by_number(name: str, tmp_path: Path) -> None:
    harm, number = BAD_HOMES[name]
    make_home(tmp_path)
    harm(tmp_path)
    done = CliRunner().invoke(cli.app, ["superlink", "--home", str(tmp_path), "--exec"])
    assert done.exit_code == 1
    assert number in done.stderr
    assert isinstance(done.exception, SystemExit)


@pytest.mark.parametrize("listen", ["abc", "1.2.3.4", "1.2.3.4:99999", "300.1.1.1:443", "[::g]:443", "a b:443", "x:1; }", ""])
def test_what_nginx_could_not_listen_on_is_refused_before_anything_is_written(listen: str, tmp_path: Path) -> None:
    home = make_home(tmp_path)
    done = CliRunner().invoke(cli.app, ["superlink", "--home", str(tmp_path), "--listen", listen])
    assert (done.exit_code, done.stdout, isinstance(done.exception, SystemExit)) == (1, "", True)
    assert done.stderr.startswith("ICM202 --listen: ")
    assert not (home.proxy / "nginx.conf").exists()


@pytest.mark.parametrize("listen", ["0.0.0.0:8443", "[::]:443", "localhost:8443"])
def test_an_address_with_its_port_is_what_nginx_listens_on(listen: str, tmp_path: Path) -> None:
    home = make_home(tmp_path)
    assert CliRunner().invoke(cli.app, ["superlink", "--home", str(tmp_path), "--listen", listen]).exit_code == 0
    assert f"listen {listen} ssl" in (home.proxy / "nginx.conf").read_text()


def test_without_a_superlink_each_command_says_so(tmp_path: Path) -> None:
    make_home(tmp_path)
    done = fl_server("list", "--home", str(tmp_path))
    assert done.returncode == 1
    assert "ICM330" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("resume", [False, True])
def test_a_live_run_of_the_study_is_stopped_only_when_asked_to_resume(
    resume: bool, make_study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, path, stopped = make_home(tmp_path), tmp_path / "study.toml", list[str]()
    path.write_text(study_toml(make_study()))
    folder_of(home, read_study(path)).note_run("7")

    def runs(_: Home) -> list[flower.Run]:
        return [flower.Run("7", "finished:stopped" if stopped else "running", "", "", "")]

    monkeypatch.setattr(flower, "runs", runs)
    monkeypatch.setattr(flower, "stop", lambda _, run_id: stopped.append(run_id))
    monkeypatch.setattr(flower, "submit", lambda *_: "8")
    if resume:
        assert start(home, path, resume=True)[1].run_id == "8"
        assert stopped == ["7"]
        return
    with pytest.raises(IcmoeError, match="ICM506"):
        start(home, path)
    assert (stopped, folder_of(home, read_study(path)).run_id) == ([], "7")


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    home = make_home(tmp_path)
    listener = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", str(home.superlink_port)]
    with running(listener, tmp_path / "log", environment()) as process:
        wait_until(lambda: "Serving" in (tmp_path / "log").read_text() or process.poll(), "a listener", 20)
        done = fl_server("superlink", "--home", str(tmp_path), "--exec")
    assert done.returncode == 1
    assert f"ICM329 port is in use: 127.0.0.1:{home.superlink_port}" in done.stderr


def test_the_app_is_laid_out_as_a_site_builds_it(tmp_path: Path) -> None:
    stale = tmp_path / "fl_server" / "old.py"
    stale.parent.mkdir()
    stale.write_text("")
    write_app(tmp_path)
    assert {path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in tmp_path.rglob("*.*")} == bundle_files(ROOT)


def test_a_round_is_told_in_one_line(make_study) -> None:
    record = {"round": 2, "sites": {"A": {}, "B": {}}, "loss": 0.51234, "faults": [{"where": "C"}], "val_dice": 0.25}
    assert sentence(record, make_study(rounds=5)) == "round 2 of 5: 2 of 3 sites, loss 0.5123; without C"
    assert dice_sentence(record) == "validation Dice after round 2: 0.2500"


# Two children: one ends at once, cleanly; the other starts a child of its own, as a SuperExec starts ServerApps.
SUPERVISED = '''
import os, sys
from fl_server.supervise import Child, supervise
python, folder = sys.executable, sys.argv[1]
grandchild = f"""
import subprocess, time
open('{folder}/pid', 'w').write(str(subprocess.Popen(['sleep', '600']).pid))
time.sleep(600)
"""
supervise([
    Child("brief", [python, "-c", f"open('{folder}/brief', 'a').write('x')"], dict(os.environ)),
    Child("parent", [python, "-c", grandchild], dict(os.environ)),
])
'''


def alive(pid: int) -> bool:
    """Whether the process runs; one that ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def supervised(tmp_path: Path):
    with running([sys.executable, "-c", SUPERVISED, str(tmp_path)], tmp_path / "log", environment()) as process:
        wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(), "a grandchild", 30)
        yield process


def test_any_exit_is_started_again_with_a_growing_delay(supervised: subprocess.Popen[bytes], tmp_path: Path) -> None:
    wait_until(lambda: (tmp_path / "brief").exists() and len((tmp_path / "brief").read_text()) >= 3, "three starts", 30)
    log = (tmp_path / "log").read_text()
    assert "ICM328 brief: supervised process ended: exit code 0. It is started again in 1 s." in log
    assert "started again in 2 s" in log


def test_sigterm_ends_everything_also_what_a_killed_child_left_behind(
    supervised: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    grandchild = int((tmp_path / "pid").read_text())
    parent = int(Path(f"/proc/{grandchild}/stat").read_text().rsplit(")", 1)[1].split()[1])
    (tmp_path / "pid").unlink()
    os.kill(parent, signal.SIGKILL)
    wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(), "the next parent", 30)
    assert alive(grandchild)
    began = time.monotonic()
    supervised.send_signal(signal.SIGTERM)
    assert supervised.wait(timeout=15) == 0
    assert time.monotonic() - began < 5
    assert not alive(grandchild)
    assert not alive(int((tmp_path / "pid").read_text()))


def test_children_end_with_a_supervisor_that_is_killed(supervised: subprocess.Popen[bytes], tmp_path: Path) -> None:
    grandchild = int((tmp_path / "pid").read_text())
    parent = int(Path(f"/proc/{grandchild}/stat").read_text().rsplit(")", 1)[1].split()[1])
    supervised.kill()
    wait_until(lambda: not alive(parent), "the child to end", 10)
    os.kill(grandchild, signal.SIGKILL)  # what a child started itself is the service's control group to end


def test_help_names_every_command() -> None:
    done = subprocess.run([*FL_SERVER, "--help"], env=environment(), capture_output=True, text=True, timeout=60, check=True)
    assert all(name in done.stdout for name in ("superlink", "run", "status", "list", "stop"))


@pytest.mark.parametrize("text", ["", "3", "[1]", '[{"number": 515, "page": 1}]', "[" * 100_000, "\xff"])
def test_what_a_run_left_beside_its_study_may_be_damaged(text: str, tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path)
    for path in (tmp_path / "run.json", tmp_path / "study.faults.json", waiting_path(folder.study)):
        path.write_bytes(text.encode("latin-1"))
    assert (folder.run_id, folder.earlier, folder.faults()) == ("", {}, [])
    assert folder.waiting().isascii()

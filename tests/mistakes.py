"""Where wrong command lines are tried: a folder with one of everything, a run in it, and what was printed."""

from __future__ import annotations

import datetime as dt
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import matplotlib.font_manager  # noqa: F401  (keeps a list of fonts for all programs, made at its first import)
import typer
from consortium import TEXT, make
from PIL import Image
from predictions import write_random_model
from typer.testing import CliRunner

from fl_client.cli import app as hospital
from fl_client.kit import join
from fl_server.cli import app as coordinator
from fl_server.new_study import study_toml
from icmoe.cli import app as researcher
from icmoe.study import Study
from simulations.phantoms import PhantomSite, write_phantoms
from simulations.run_sim import app as rehearsal

ROOT = Path(__file__).parents[1]
CLOSED_PORT = 1
"""Of loopback, where nobody listens: tcpmux."""
PROGRAMS: dict[str, tuple[typer.Typer, str]] = {
    "fl_client": (hospital, "from fl_client.cli import main"),
    "fl_server": (coordinator, "from fl_server.cli import main"),
    "icmoe": (researcher, "from icmoe.cli import main"),
    "run_sim.py": (rehearsal, "from simulations.run_sim import main"),
}


WIDE = {"COLUMNS": "1000", "NO_COLOR": "1", "XDG_CACHE_HOME": "cache-of-the-user"}
FILE_RIGHTS = "-dac_override,-dac_read_search"
MOUNTED = 'mkdir -p full && mount -t tmpfs -o size=4k tmpfs full && head -c 4096 /dev/zero > full/taken; exec "$@"'
HEMMED_IN = [
    *("unshare", "--mount", "sh", "-ec", MOUNTED, "sh"),
    *("setpriv", f"--bounding-set={FILE_RIGHTS}", f"--inh-caps={FILE_RIGHTS}"),
]
"""Root without root's rights over files, and a full disk that nobody else sees."""


@dataclass(frozen=True)
class Printed:
    """What a program left: its exit code and its lines."""

    code: int
    lines: tuple[str, ...]


def lay_out(folder: Path, study: Study) -> None:
    """Make one of everything that a command line may name, and nothing that is secret anywhere else."""
    write_phantoms(
        folder / "data", seed=1, size_px=32, sites=[PhantomSite(name="Alder", train_patients=2, val_patients=1, test_patients=1)]
    )
    for name in ("folder", "photos", "closed", "sealed"):
        (folder / name).mkdir()
    (folder / "empty").touch()
    for name in ("photo.jpg", "photos/photo.jpg"):
        Image.new("L", (32, 32), 90).save(folder / name)
    (folder / "study.toml").write_text(study_toml(study))
    (folder / "results.json").write_text(json.dumps({"schema_version": 1}))
    write_random_model(folder / "model.safetensors", study)
    _lay_out_consortium(folder)
    _lay_out_sites(folder)
    for name in ("site.toml", "study.toml", "model.safetensors"):
        (folder / "closed" / name).write_bytes((folder / name).read_bytes())
        (folder / "closed" / name).chmod(0)
    (folder / "closed" / "scenario.toml").touch(mode=0)
    (folder / "sealed").chmod(0o500)


def _lay_out_consortium(folder: Path) -> None:
    now = dt.datetime.now(dt.UTC)
    text = TEXT.replace("coordinator.example:443", f"127.0.0.1:{CLOSED_PORT}")
    make(folder, "Alder", port=CLOSED_PORT, text=text, now=now)
    (folder / "out").rename(folder / "home")
    join(folder / "home/sites/Alder/kit", "Alder", folder / "joined.toml", digest=None, new_key=False, now=now)


def _lay_out_sites(folder: Path) -> None:
    common = 'name = "Alder"\ncache = "cache"\nallow_test_only = true\n'
    joined = f'[coordinator]\naddress = "127.0.0.1:{CLOSED_PORT}"\nca = "Alder/ca.crt"\nkey = "Alder/node.key"\n'
    ingest = '[ingest]\nfolder = "photos"\nstore = "store"\nlabels.lesion = ["Tumor"]\n'
    (folder / "joined.toml").write_text(common + 'data = "data"\n' + joined)
    (folder / "site.toml").write_text(common + 'data = "data"\n')
    (folder / "photos.toml").write_text(common + ingest)
    said = run_here(folder, "fl_client", ["--site", "Alder", "--config", "site.toml", "approve", "study.toml", "--yes"])
    assert said.code == 0, said


def contents(folder: Path) -> dict[str, bytes]:
    """Everything that lies in the folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def run_here(folder: Path, program: str, words: Sequence[str]) -> Printed:
    """Run a program in this process, in the folder."""
    with chdir(folder), patch.object(sys, "argv", [program, *words]):
        done = CliRunner().invoke(PROGRAMS[program][0], list(words), prog_name=program, env=WIDE)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return Printed(done.exit_code, tuple(done.output.splitlines()))


def run_apart(folder: Path, program: str, words: Sequence[str]) -> Printed:
    """Run a program as a process of its own."""
    code = f"import sys; sys.argv[0] = {program!r}; {PROGRAMS[program][1]}; main()"
    settings = {**os.environ, **WIDE, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(
        command, cwd=folder, env=settings, capture_output=True, text=True, timeout=120, check=False, stdin=subprocess.DEVNULL
    )
    return Printed(done.returncode, tuple((done.stdout + done.stderr).splitlines()))


def run_hemmed_in(folder: Path, typed: Sequence[str]) -> dict[str, Printed]:
    """Run programs in one process whose rights end where a user's do, and whose folder `full` has no room."""
    settings = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [*HEMMED_IN, sys.executable, "-m", "mistakes", *typed]
    done = subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True, timeout=240, check=True)
    return {line: Printed(code, tuple(lines)) for line, (code, lines) in json.loads(done.stdout).items()}


def why_not_hemmed_in() -> str:
    """Why no process can be hemmed in here; empty where one can."""
    done = subprocess.run([*HEMMED_IN, "true"], capture_output=True, text=True, timeout=20, check=False, cwd="/tmp")
    return "" if done.returncode == 0 else f"needs unshare and setpriv of util-linux, and root: {done.stderr.strip()}"


def main() -> None:
    """Run the command lines given as arguments in the present folder and print what each left, as JSON."""
    left = {line: run_here(Path.cwd(), line.split()[0], line.split()[1:]) for line in sys.argv[1:]}
    sys.stdout.write(json.dumps({line: (printed.code, printed.lines) for line, printed in left.items()}))


if __name__ == "__main__":
    main()

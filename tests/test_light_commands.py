"""Commands that only read records start at once: PyTorch, a second and more to import, stays out of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from shown import make_home, play

RUN = """
import sys
from {package}.cli import main
{before}
sys.argv = {words}
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
assert "torch" not in sys.modules
"""
SITE = 'name = "Alder"\ndata = "images"\n'


@pytest.mark.parametrize("command", ["status", "history", "approvals", "audit", "audit verify", "ledger"])
def test_a_site_reads_its_records_without_pytorch(command: str, tmp_path: Path):
    (tmp_path / "site.toml").write_text(SITE)
    words = ["fl_client", "--site", "Alder", "--config", str(tmp_path / "site.toml"), *command.split()]
    require_light("fl_client", words)


def test_a_study_is_written_without_pytorch(tmp_path: Path):
    answers = {"--name": "a", "--labels": "lesion=1", "--rounds": "2", "--quorum": "2", "--deadline-s": "60", "--seed": "1"}
    words = ["fl_server", "new-study", str(tmp_path / "study.toml"), *(word for pair in answers.items() for word in pair)]
    require_light("fl_server", words)


SUPERLINK = """
from fl_server import commands, flower, home
commands.read_home = home.find_home  # a folder without certificates
flower.runs = lambda home: [flower.Run("4242", "running", "", "", "")]
"""


@pytest.mark.parametrize("command", ["status", "list"])
def test_the_coordinator_reads_how_far_a_run_came_without_pytorch(command: str, make_study, tmp_path: Path):
    play(make_home(tmp_path), make_study(), rounds=1)
    said = require_light("fl_server", ["fl_server", command, "--home", str(tmp_path)], SUPERLINK)
    assert "1 of 2" in said


def require_light(package: str, words: list[str], before: str = "") -> str:
    script = RUN.format(package=package, words=words, before=before)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("package", ["fl_client", "fl_server", "icmoe", "simulations.run_sim"])
def test_a_working_directory_that_was_removed_is_told_by_number(package: str, tmp_path: Path):
    main = f"from {package}{'' if '.' in package else '.cli'} import main; main()"
    words = [sys.executable, "-c", f"import os; os.rmdir({str(tmp_path)!r}); {main}", "--help"]
    root = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(words, cwd=tmp_path, env=root, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr[:42]) == (1, "", "ICM205 working directory is not there: No ")

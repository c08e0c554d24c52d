"""A site's records on a disk that may only be read: who asks how it stands is told, and nothing that writes begins."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hospitals import Hospital, authority, hospital, prepared

__all__ = ["authority", "hospital", "prepared"]
ROOT = Path(__file__).parents[1]
SETPRIV = shutil.which("setpriv")
AS_OTHERS = [SETPRIV or "", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"] if os.geteuid() == 0 else []
"""Root may write to everything, unless it gives that right up."""


@pytest.fixture
def closed(hospital: Hospital) -> Iterator[Hospital]:
    """A site whose folder may only be read."""
    if AS_OTHERS and SETPRIV is None:
        pytest.skip("root needs setpriv to be bound by the permissions of files")
    for path in (*hospital.folder.rglob("*"), hospital.folder):
        path.chmod(0o500 if path.is_dir() else 0o400)
    yield hospital
    for path in (hospital.folder, *hospital.folder.rglob("*")):
        path.chmod(0o700)


def asked(site: Hospital, *words: str) -> tuple[int, str]:
    command = [sys.executable, "-c", "from fl_client.cli import main; main()", "--site", "Alder", "--config", str(site.path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [*AS_OTHERS, *command, *words], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("words", ["status", "history", "ledger", "audit", "audit verify", "approvals", "show"])
def test_who_only_reads_is_answered(closed: Hospital, words: str) -> None:
    before = {path.name: path.read_bytes() for path in (closed.folder / "state").iterdir() if path.is_file()}
    code, output = asked(closed, *words.split())
    assert (code, "ICM" in output) == (0, False), output
    assert {path.name: path.read_bytes() for path in (closed.folder / "state").iterdir() if path.is_file()} == before


def test_a_page_is_written_elsewhere(closed: Hospital, tmp_path: Path) -> None:
    for words in (["report", "--out"], ["ledger", "--page"]):
        page = tmp_path / f"{words[0]}.html"
        code, output = asked(closed, *words, str(page))
        assert (code, page.is_file()) == (0, True), output


@pytest.mark.parametrize("words", ["withdraw tiny", "approve {study} --yes"])
def test_who_writes_is_refused_by_number(closed: Hospital, words: str) -> None:
    code, output = asked(closed, *words.format(study=closed.folder / "study.toml").split())
    assert (code, "ICM205" in output, "Traceback" in output) == (1, True, False), output


def test_the_check_says_that_it_is_too_little_to_take_part(closed: Hospital) -> None:
    code, output = asked(closed, "check")
    assert (code, f"ICM205 {closed.folder / 'state'}: it may only be read." in output) == (1, True), output


def test_a_ledger_that_waits_for_its_journal_is_refused_until_somebody_may_write(hospital: Hospital) -> None:
    path = hospital.folder / "state/ledger.sqlite"
    lines = "import os, sqlite3, sys; c = sqlite3.connect(sys.argv[1]); c.execute('PRAGMA cache_spill = 1')"
    lines += "; c.execute('PRAGMA cache_size = 1'); c.execute('UPDATE about SET value = hex(zeroblob(90000))'); os._exit(0)"
    subprocess.run([sys.executable, "-c", lines, str(path)], check=True)
    assert path.with_name("ledger.sqlite-journal").exists()
    for file in (path, path.parent):
        file.chmod(0o500)
    assert "ICM205" in asked(hospital, "ledger")[1]
    for file in (path.parent, path):
        file.chmod(0o700)
    assert asked(hospital, "ledger")[0] == 0

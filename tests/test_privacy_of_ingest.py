"""Nothing that identifies goes further: markers in every text of every file, looked for in all that is kept or sent."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

import pytest
from flower_processes import ROOT, SCRIPTS, child, environment, free_port, listens, recorded, wait_for
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from planting import marked, planted_series, search
from pydicom import dcmread

from icmoe.backbone import backbone_digest
from icmoe.data.ingest import index
from icmoe.data.ingest.run import Export, ingest
from icmoe.data.ingest.settings import IngestSettings
from icmoe.study import Label

LABELS = (Label(name="background", values=(0,)), Label(name="lesion", values=(255,)))
STUDY = f"""
name = "tiny"
seed = 1
rounds = 1
deadline_s = 120.0
test_only = true
[[labels]]
name = "background"
values = [0]
[[labels]]
name = "lesion"
values = [255]
[backbone]
name = "sam-vit-test"
image_size = 32
digest = "{backbone_digest("sam-vit-test", None)}"
[model]
basic_experts = 1
semantic_experts = 1
adaptive_experts = 1
bottleneck = 8
"""
SITE = """
name = "Elm"
allow_test_only = true
cache = "cache"
[ingest]
folder = "export"
shares = [1.0, 0.0, 0.0]
"""


@settings(max_examples=5, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(token=st.integers(2**40, 2**44 - 1).map(lambda value: f"{value:X}"), seed=st.integers(0, 99))
def test_no_marker_of_any_header_is_in_index_or_frames(token: str, seed: int):
    assert len(marked(token)) > 1000
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        planted_series(place / "export", token, 2, seed)
        export = Export(
            site="Elm",
            root=place / "export",
            store=place / "kept/store",
            secret_folder=place / "kept",
            labels=LABELS,
            settings=IngestSettings(folder="x", processes=1, shares=(1.0, 0.0, 0.0)),
        )
        ingest(export)
        data = index.read_index(export.store)
        assert len(data.slices) == 2, "the series is used in spite of all markers"
        search(token, "what readers see", repr(data).encode())
        kept = [path for path in (place / "kept").rglob("*") if path.is_file()]
        assert len(kept) >= 4
        for path in kept:
            search(token, path.name, path.name.encode() + path.read_bytes())


def test_no_marker_is_in_logs_report_cache_update_or_on_the_wire(tmp_path: Path):
    """A hospital's whole path with real processes: ingest, encode, one federated round over a recorded connection."""
    tokens = [f"C0FFEE1234{patient}" for patient in range(3)]
    for patient, token in enumerate(tokens):
        planted_series(tmp_path / f"export/{patient}", token, 2, patient)
    (tmp_path / "study.toml").write_text(STUDY)
    site = tmp_path / "site.toml"
    site.write_text(SITE)
    lines = ("approve study.toml --yes", "ingest --dry-run", "ingest", "ingest --json", "show", "prepare")
    said = b"".join(command(tmp_path, site, *line.split()) for line in lines)
    assert b"6 of 6 images used" in said
    wire = federated_round(tmp_path, site)
    assert b"val-dice" in wire, "what is said on the wire is recorded in clear"
    assert len(wire) > 100_000, "the update itself is in the record"
    kept = [path for name in ("ingest", "cache", "flower") for path in (tmp_path / name).rglob("*") if path.is_file()]
    names = {path.name for path in kept}
    assert {"index.sqlite", "quality.json", "link.log", "node.log"} <= names
    assert any(path.parts[-3] == "cache" for path in kept)
    for token in tokens:
        search(token, "what the commands print", said)
        search(token, "the bytes on the wire", wire)
        search(token, "the model", (tmp_path / "study.model.safetensors").read_bytes())
        for path in kept:
            search(token, path.name, path.name.encode() + path.read_bytes())


def command(place: Path, site: Path, *words: str) -> bytes:
    line = [str(SCRIPTS / "fl_client"), "--site", "Elm", "--config", str(site), *words]
    ran = subprocess.run(line, capture_output=True, timeout=120, env=environment(place), cwd=place)
    assert ran.returncode == 0, ran.stderr.decode()
    return ran.stdout + ran.stderr


def federated_round(place: Path, site: Path) -> bytes:
    """Run the study with a real SuperLink and SuperNode and return every byte between them; logs go to flower/*.log."""
    (place / "flower").mkdir()
    api, local = free_port(), free_port()
    superlink = f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{api}"\ninsecure = true\n'
    (place / "flower/config.toml").write_text(superlink)
    with recorded(api) as (port, record):
        link = ["flower-superlink", "--insecure", "--port", str(api)]
        node = ["flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}", "--port", str(local)]
        with child(place, link, "link"), child(place, node, "node", FL_CLIENT_SITE_FILE=str(site)):
            wait_for(lambda: listens(api), 60)
            run = [SCRIPTS / "flwr", "run", str(ROOT), "here", "-c", f'study="{place / "study.toml"}"']
            started = subprocess.run(run, env=environment(place), capture_output=True, timeout=60)
            assert started.returncode == 0, started.stdout + started.stderr
            wait_for((place / "study.model.safetensors").exists, 200)
        return b"".join(record)


def test_the_search_finds_a_marker_that_is_there(tmp_path: Path):
    planted_series(tmp_path, "ABCDEF01", 1, 0)
    found = dcmread(next(tmp_path.rglob("* 0.dcm")))
    assert str(found.PatientName).startswith("ZQABCDEF01")
    for path in tmp_path.rglob("*.dcm"):
        with pytest.raises(AssertionError):
            search("ABCDEF01", path.name, path.read_bytes())

"""Nothing that identifies goes further: markers in every text of every file, looked for in all that is kept or sent."""

from __future__ import annotations

import ssl
import tempfile
from contextlib import nullcontext
from pathlib import Path

import pytest
from consortium import client, fl_server, listens, make_home, participating, serving, wait_until
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from loopback import recorded
from planting import marked, planted_series, search
from pydicom import dcmread

from fl_server.home import Home
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
allow_test_only = true
cache = "cache"
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
    """A hospital's whole path with the product's own commands: kit, approval, ingest, one round over a recorded connection."""
    tokens = [f"C0FFEE1234{patient}" for patient in range(3)]
    for patient, token in enumerate(tokens):
        planted_series(tmp_path / f"export/{patient}", token, 2, patient)
    (tmp_path / "study.toml").write_text(STUDY)
    home = make_home(tmp_path / "home", "Elm")
    site = tmp_path / "hospital/Elm.toml"
    said = client(site, "init", "--kit", str(home.site("Elm") / "kit"))
    text = site.read_text().replace("/pacs/export", str(tmp_path / "export"))
    site.write_text(SITE + text.replace("[coordinator]", "shares = [1.0, 0.0, 0.0]\n[coordinator]"))
    approve = f"approve {tmp_path / 'study.toml'} --yes"
    said += "".join(client(site, *line.split()) for line in (approve, "ingest --dry-run", "ingest", "ingest --json", "show"))
    assert "6 of 6 images used" in said
    wire, model = federated_round(home, site, tmp_path / "study.toml")
    assert b"val-dice" in wire, "what is said on the wire is recorded in clear"
    assert len(wire) > 100_000, "the update itself is in the record"
    kept = [path for name in ("hospital", "home") for path in (tmp_path / name).rglob("*") if path.is_file()]
    names = {path.name for path in kept}
    assert {
        "index.sqlite",
        "quality.json",
        "superlink.log",
        "supernode.log",
        "audit.jsonl",
        "ledger.sqlite",
        "Elm.receipt",
        "state.db",
        model.name,
    } <= names
    assert any("cache" in path.parts for path in kept)
    for token in tokens:
        search(token, "what the commands print", said.encode())
        search(token, "the bytes on the wire", wire)
        for path in kept:
            search(token, path.name, path.name.encode() + path.read_bytes())


def federated_round(home: Home, site: Path, study: Path) -> tuple[bytes, Path]:
    """Run the study and return every byte between hospital and coordinator, and the model; a recorder stands in nginx's place."""
    server, upstream = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context(cafile=str(home.ca))
    server.load_cert_chain(home.certificate, home.key)
    with serving(home, home.root / "superlink.log"), recorded(home.public_port, server, home.superlink_port, upstream) as record:
        wait_until(lambda: listens(home.superlink_port), "SuperLink on its port")
        for command in (["admit", str(site.with_suffix("") / "request.json")], ["run", str(study)]):
            with participating(site, home.root / "Elm.log") if command[0] == "run" else nullcontext():
                done = fl_server(*command, "--home", str(home.root), timeout_s=240)
            assert done.returncode == 0, done.stderr
    return b"".join(record), next(home.runs.rglob("study.model.safetensors"))


def test_the_search_finds_a_marker_that_is_there(tmp_path: Path):
    planted_series(tmp_path, "ABCDEF01", 1, 0)
    found = dcmread(next(tmp_path.rglob("* 0.dcm")))
    assert str(found.PatientName).startswith("ZQABCDEF01")
    for path in tmp_path.rglob("*.dcm"):
        with pytest.raises(AssertionError):
            search("ABCDEF01", path.name, path.read_bytes())

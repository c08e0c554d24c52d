"""A hospital with data, key and CA, to be harmed by the tests of the preflight."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from loopback import Authority
from test_client import write_site_file, write_study_file
from typer.testing import CliRunner

from fl_client import cli
from fl_client.credentials import make_node_key
from simulations.phantoms import PhantomSite, write_phantoms


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="session")
def prepared(make_study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hospital whose features are in its cache."""
    folder = tmp_path_factory.mktemp("hospital")
    site = PhantomSite(name="Alder", train_patients=2, val_patients=1, test_patients=1)
    write_phantoms(folder / "export", seed=1, size_px=32, sites=[site])
    path, study = write_site_file(folder, folder / "export"), write_study_file(folder / "study.toml", make_study())
    for words in (["approve", str(study), "--yes"], ["prepare"]):
        done = CliRunner().invoke(cli.app, ["--site", "Alder", "--config", str(path), *words])
        assert done.exit_code == 0, done.output
    return folder


class Hospital:
    """A copy of the prepared hospital with a key and a CA of its own, to be harmed."""

    def __init__(self, folder: Path, source: Path, authority: Authority) -> None:
        self.folder, self.path = folder / "h", folder / "h" / "site.toml"
        shutil.copytree(source, self.folder)
        self.key, self.ca = self.folder / "node.key", self.folder / "ca.crt"
        make_node_key(self.key)
        shutil.copy(authority.path, self.ca)
        self.text = self.path.read_text()

    def at(self, address: object, **more: str) -> Hospital:
        chosen = address if isinstance(address, str) else f"localhost:{address}"
        section = {"address": chosen, "ca": "ca.crt", "key": "node.key", **more}
        lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in section.items())
        self.path.write_text(f"{self.text}\n[coordinator]\n{lines}")
        return self

    def approves(self, old: str, new: str) -> None:
        """Approve the study with one text changed, and nothing else."""
        study = self.folder / "study.toml"
        study.write_text(study.read_text().replace(old, new))
        shutil.rmtree(self.folder / "state/approvals", ignore_errors=True)
        done = CliRunner().invoke(cli.app, ["--site", "Alder", "--config", str(self.path), "approve", str(study), "--yes"])
        assert done.exit_code == 0, done.output

    def run(self, *extra: str, site: str = "Alder") -> tuple[int, str]:
        done = CliRunner().invoke(cli.app, ["--site", site, "--config", str(self.path), "check", *extra])
        assert "Traceback" not in done.output
        assert done.exception is None or isinstance(done.exception, SystemExit)
        return done.exit_code, done.output

    def faults(self) -> list[dict[str, Any]]:
        code, output = self.run("--json")
        record = json.loads(output)
        assert record["ok"] == (code == 0) == all(line["ok"] for line in record["checks"])
        found = [{**line, **line["fault"]} for line in record["checks"] if line["fault"]]
        for fault in found:
            assert fault["sentence"].startswith(f"ICM{fault['number']} ")
            assert "\n" not in fault["sentence"]
        return found

    def only_fault(self) -> dict[str, Any]:
        found = self.faults()
        assert len(found) == 1, found
        assert not found[0]["ok"]
        return found[0]


@pytest.fixture
def hospital(tmp_path: Path, prepared: Path, authority: Authority) -> Hospital:
    return Hospital(tmp_path, prepared, authority)

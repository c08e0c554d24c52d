"""Consortia on disk, as the tests of provisioning, kits and admission make them through the command lines."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from loopback import NOW
from typer.testing import CliRunner

from fl_client import cli as client
from fl_client.kit import join
from fl_server import cli as server
from fl_server.provisioning import Provisioned, provision
from icmoe.errors import IcmoeError
from icmoe.joining import make_request, parse_certificate

TEXT = """\
name = "Lesion group"
[coordinator]
address = "coordinator.example:443"
names = ["10.1.2.3"]
superlink_port = {port}
"""


def write_consortium(folder: Path, *sites: str, port: int = 8000, text: str = TEXT) -> Path:
    path = folder / "consortium.toml"
    entries = "".join(f'[[sites]]\nname = "{site}"\n' for site in sites or ("Alder", "Birch"))
    path.write_text(text.format(port=port) + entries)
    return path


def make(folder: Path, *sites: str, renew: bool = False, now: dt.datetime = NOW, **settings: object) -> Provisioned:
    return provision(write_consortium(folder, *sites, **settings), folder / "out", renew=renew, now=now)


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def numbers(error: pytest.ExceptionInfo[IcmoeError]) -> list[int]:
    return [fault.number for fault in error.value.faults]


def serve(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(server.app, [str(argument) for argument in arguments])
    assert "Traceback" not in done.output
    return done.exit_code, done.output


def init(kit: Path, folder: Path, *extra: object, site: str = "Alder") -> tuple[int, str]:
    arguments = ["--site", site, "--config", folder / "site" / f"{site}.toml", "init", "--kit", kit, *extra]
    done = CliRunner().invoke(client.app, [str(argument) for argument in arguments])
    assert "Traceback" not in done.output
    return done.exit_code, done.output


def request_of(folder: Path, site: str, *, ca: Path | None = None) -> Path:
    kit = folder / "out" / "sites" / site / "kit"
    join(kit, site, folder / "site" / f"{site}.toml", digest=None, new_key=False, now=NOW)
    path = folder / "site" / site / "request.json"
    if ca is not None:
        foreign = make_request(site, ec.generate_private_key(ec.SECP384R1()), parse_certificate(ca.read_bytes(), where=""))
        path.write_text(foreign.model_dump_json())
    return path

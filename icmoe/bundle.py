"""The Flower app that a study runs: the two app packages as they are installed, and nothing else.

Coordinator and site lay the same folder from their own installations, so that one builder gives both the same digest.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from icmoe import __version__
from icmoe.atomic import write_atomically
from icmoe.errors import Fault, IcmoeError

PACKAGES = ("fl_client", "fl_server")

# Without dependencies: what the apps import is installed at coordinator and site, never fetched when a run starts.
PROJECT = f"""[project]
name = "icmoe-federated"
version = "{__version__}"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "icmoe"
fab-include = [{", ".join(f'"{package}/*.py"' for package in PACKAGES)}]

[tool.flwr.app.components]
serverapp = "fl_server.app:app"
clientapp = "fl_client.app:app"

[tool.flwr.app.config]
study = "study.toml"
"""


def app_files() -> dict[str, bytes]:
    """Return the app's files by their path in it.

    Raises
    ------
    IcmoeError
        205 where a package is not installed as files.
    """
    files = {"pyproject.toml": PROJECT.encode()}
    for package in PACKAGES:
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise IcmoeError(Fault(number=205, where=package, what="package is not installed", did="Nothing was built."))
        for path in sorted(Path(spec.origin).parent.glob("*.py")):
            files[f"{package}/{path.name}"] = path.read_bytes()
    return files


def write_app(folder: Path) -> None:
    """Write the app into `folder`; Python files there that are not part of it are removed."""
    files = app_files()
    for package in PACKAGES:
        for path in (folder / package).glob("*.py"):
            if f"{package}/{path.name}" not in files:
                path.unlink()
    for name, data in files.items():
        write_atomically(folder / name, data, durable=False)

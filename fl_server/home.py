"""The coordinator's folder: what `fl_server provision` made, and where Flower's state and the studies' runs are kept."""

from __future__ import annotations

import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from icmoe.atomic import write_atomically
from icmoe.config import Section, parse, read_toml
from icmoe.errors import Fault, IcmoeError
from icmoe.private import read_private

CONNECTION = "coordinator"


class Coordinator(Section):
    """What is needed of the consortium file's section of the same name."""

    address: Annotated[str, Field(pattern=r"^[A-Za-z0-9.-]+:[0-9]{1,5}$")]
    """Public host:port, the one that hospitals connect to."""
    superlink_port: Annotated[int, Field(ge=1, le=65535)] = 8000
    """Port of the SuperLink on loopback."""


@dataclass(frozen=True, slots=True)
class Home:
    """The coordinator's folder.

    Parameters
    ----------
    root
        Output folder of `fl_server provision`.
    address
        Public host:port.
    superlink_port
        Port of the SuperLink on loopback.
    """

    root: Path
    address: str
    superlink_port: int

    @property
    def folder(self) -> Path:
        """The coordinator's own part."""
        return self.root / "coordinator"

    @property
    def ca(self) -> Path:
        """Certificate of the consortium's CA."""
        return self.folder / "ca.crt"

    @property
    def certificate(self) -> Path:
        """Server certificate, then the CA's."""
        return self.folder / "server.crt"

    @property
    def key(self) -> Path:
        """Private key of the server certificate."""
        return self.folder / "server.key"

    @property
    def secret(self) -> Path:
        """Secret between SuperLink and SuperExec."""
        return self.folder / "superexec.secret"

    @property
    def database(self) -> Path:
        """SuperLink's database; updates wait in it unencrypted."""
        return self.folder / "state.db"

    @property
    def proxy(self) -> Path:
        """Configuration of nginx, and below it the one folder that nginx writes to."""
        return self.folder / "proxy"

    @property
    def runs(self) -> Path:
        """One folder per study: its file, its state, its model."""
        return self.folder / "runs"

    @property
    def public_port(self) -> int:
        """Port that hospitals connect to."""
        return int(self.address.rpartition(":")[2])

    @property
    def superlink(self) -> str:
        """Loopback address of the SuperLink."""
        return f"127.0.0.1:{self.superlink_port}"

    def settings(self) -> dict[str, str]:
        """Return the environment variables that every Flower process of the coordinator gets."""
        return {
            "FLWR_HOME": str(self.folder / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }

    def environment(self) -> dict[str, str]:
        """Return the whole environment; Flower starts its own programs by bare name, hence the path."""
        path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
        return {**os.environ, **self.settings(), "PATH": path}

    def write_flower_configuration(self) -> None:
        """Write the connection of Flower's command line: loopback, by TLS."""
        text = f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
        text += f'address = "{self.superlink}"\nroot-certificates = "{self.ca}"\n'
        write_atomically(self.folder / "flwr" / "config.toml", text.encode(), private=True)


def read_home(root: Path) -> Home:
    """Return the coordinator's folder, complete and private.

    Raises
    ------
    IcmoeError
        201-205 for its consortium.toml, 326 per missing file, 306 for a private file that others may read.
    """
    path = root / "consortium.toml"
    section = read_toml(path).get("coordinator", {})
    values = {key: section[key] for key in Coordinator.model_fields if isinstance(section, dict) and key in section}
    settings = parse(Coordinator, values, where=f"{path} [coordinator]")
    home = Home(root.resolve(), settings.address, settings.superlink_port)
    needed = [home.ca, home.certificate, home.key, home.secret]
    faults = [Fault(number=326, where=str(path), did="Nothing was started.") for path in needed if not path.is_file()]
    if faults:
        raise IcmoeError(*faults)
    for private in (home.key, home.secret):
        read_private(private)
    return home

"""The coordinator's folder: what `fl_server provision` made, and where Flower's state and the studies' runs are kept."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from fl_server.consortium import Consortium, read_consortium
from icmoe.atomic import write_atomically
from icmoe.errors import NOT_STARTED, Fault, IcmoeError
from icmoe.joining import split_address
from icmoe.private import read_private

CONNECTION = "coordinator"
FILE = "consortium.toml"


@dataclass(frozen=True, slots=True)
class Home:
    """The coordinator's folder.

    Parameters
    ----------
    root
        Output folder of `fl_server provision`.
    consortium
        What its consortium.toml says.
    """

    root: Path
    consortium: Consortium

    @property
    def file(self) -> Path:
        """The consortium file as it was provisioned."""
        return self.root / FILE

    @property
    def signing_ca(self) -> Path:
        """Certificate of the consortium's CA, beside its key."""
        return self.root / "ca" / "ca.crt"

    @property
    def signing_key(self) -> Path:
        """Key of the CA; between renewals it may lie on another medium."""
        return self.root / "ca" / "ca.key"

    def site(self, name: str) -> Path:
        """Folder of a site: its kit and its public key."""
        return self.root / "sites" / name

    def public_key(self, name: str) -> Path:
        """Public key of an admitted site."""
        return self.site(name) / "node.pub"

    @property
    def folder(self) -> Path:
        """What the coordinator's services read and write."""
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
    def address(self) -> str:
        """Public host:port."""
        return self.consortium.coordinator.address

    @property
    def public_port(self) -> int:
        """Port that hospitals connect to."""
        return split_address(self.address)[1]

    @property
    def superlink_port(self) -> int:
        """Port of the SuperLink on loopback."""
        return self.consortium.coordinator.superlink_port

    @property
    def superlink(self) -> str:
        """Loopback address of the SuperLink."""
        return f"127.0.0.1:{self.superlink_port}"

    @property
    def flower(self) -> Path:
        """Folder of Flower's own files."""
        return self.folder / "flwr"

    def write_flower_configuration(self) -> None:
        """Write the connection of Flower's command line: loopback, by TLS."""
        text = f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
        ca = json.dumps(str(self.ca), ensure_ascii=False)  # a text of JSON is one of TOML, but for its surrogates
        text += f'address = "{self.superlink}"\nroot-certificates = {ca}\n'
        write_atomically(self.flower / "config.toml", text.encode(), private=True)


def find_home(root: Path) -> Home:
    """Return the coordinator's folder as its consortium.toml describes it, whatever else is there.

    Raises
    ------
    IcmoeError
        201-205 for its consortium.toml.
    """
    return Home(root.resolve(), read_consortium(root / FILE))


def read_home(root: Path) -> Home:
    """Return the coordinator's folder, complete and private.

    Raises
    ------
    IcmoeError
        201-205 for its consortium.toml, 326 per missing or empty file, 306 for a private file that others may read.
    """
    home = find_home(root)
    needed = [home.ca, home.certificate, home.key, home.secret]
    lacking = [path for path in needed if not path.is_file() or not path.stat().st_size]
    if faults := [Fault(number=326, where=str(path), did=NOT_STARTED) for path in lacking]:
        raise IcmoeError(*faults)
    for private in (home.key, home.secret):
        read_private(private)
    return home

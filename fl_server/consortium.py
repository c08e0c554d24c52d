"""The consortium file: who takes part, and where the coordinator can be reached."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from icmoe.config import Section, parse, read_toml
from icmoe.joining import Address, ConsortiumName, SiteName, split_address

HostName = Annotated[str, Field(pattern=r"^[A-Za-z0-9._:-]{1,253}$")]


class Coordinator(Section):
    """The machine that all sites connect to."""

    address: Address
    """Public host:port of the reverse proxy, as the sites write it."""
    names: tuple[HostName, ...] = ()
    """Further host names or IP addresses of the server certificate."""
    superlink_port: Annotated[int, Field(ge=1, le=65_535)] = 8000
    """Port of the SuperLink on 127.0.0.1; never open it to a network."""

    @property
    def certificate_names(self) -> tuple[str, ...]:
        """Host names and IP addresses that the server certificate carries; the SuperExec uses the loopback ones."""
        return tuple(dict.fromkeys([split_address(self.address)[0], *self.names, "localhost", "127.0.0.1"]))


class SiteEntry(Section):
    """One hospital."""

    name: SiteName
    """Its name in studies, results and its site file."""


class Consortium(Section):
    """The whole file."""

    schema_version: Literal[1] = 1
    """Layout of the file."""
    name: ConsortiumName
    """Name of the consortium, also in its certificates."""
    valid_days: Annotated[int, Field(ge=1, le=825)] = 365
    """Life of the server certificate, days."""
    ca_valid_days: Annotated[int, Field(ge=1, le=7300)] = 3650
    """Life of the CA certificate, days."""
    coordinator: Coordinator
    """Addresses."""
    sites: Annotated[tuple[SiteEntry, ...], Field(min_length=1)]
    """The hospitals."""

    @model_validator(mode="after")
    def _names_differ(self) -> Consortium:
        names = [site.name.lower() for site in self.sites]
        if len(set(names)) < len(names):
            raise ValueError("sites whose names differ in more than capitals")
        return self

    @property
    def site_names(self) -> tuple[str, ...]:
        """Names of the hospitals, as in the file."""
        return tuple(site.name for site in self.sites)


def read_consortium(path: Path) -> Consortium:
    """Return the consortium of a file.

    Raises
    ------
    IcmoeError
        201-205, every fault of the file at once.
    """
    return parse(Consortium, read_toml(path), where=str(path))

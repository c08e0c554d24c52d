"""`fl_client init`: from a start kit to a site that can ask to be admitted."""

from __future__ import annotations

import datetime as dt
import os
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from rich.console import Console

from fl_client.credentials import make_node_key, parse_ca, read_node_key
from icmoe.atomic import read_regular, write_atomically
from icmoe.config import parse
from icmoe.errors import Fault, IcmoeError
from icmoe.joining import (
    CHECKSUMS,
    KIT_FILES,
    Kit,
    checksum_text,
    fingerprint,
    kit_digest,
    make_request,
    validity_fault,
)
from icmoe.locks import claim
from icmoe.private import file_errors, read_small

SITE_FILE = """\
# Site file of {site} in {consortium}; paths are relative to this file.
# Fill in what is marked, then run: fl_client --site {site} check
name = "{site}"
[ingest]
folder = "/pacs/export"         # to fill in: your export of DICOM, NIfTI and PNG; only read
{section}"""
SECTION = """\
[coordinator]
address = "{address}"
ca = "{site}/ca.crt"
key = "{site}/node.key"
"""


@dataclass(frozen=True, slots=True)
class Joined:
    """What `init` made.

    Parameters
    ----------
    request
        File to send to the coordinator.
    fingerprint
        Of the site's key, to be read out to the coordinator.
    kit_digest
        To be compared with the coordinator's.
    made
        Files that were written.
    section
        What the site file should say under [coordinator]; empty where it does, or was written now.
    """

    request: Path
    fingerprint: str
    kit_digest: str
    made: tuple[Path, ...]
    section: str


def read_kit(folder: Path, site: str) -> tuple[Kit, dict[str, bytes]]:
    """Return a kit and its files after comparing each with the kit's checksums.

    Raises
    ------
    IcmoeError
        205 where a file cannot be read, 310 where one was changed, was added or is missing, or the kit is another site's.
    """
    try:
        names = {path.name for path in folder.iterdir()}
    except OSError as error:
        raise IcmoeError(Fault(number=205, where=str(folder), value=error.strerror or "", did="Nothing was made.")) from None
    expected = {*KIT_FILES, CHECKSUMS}
    if names != expected:
        raise _unusable(folder, "kit has other files than a kit has", ", ".join(sorted(names ^ expected)))
    files = {name: read_small(folder / name) for name in KIT_FILES}
    if (found := read_small(folder / CHECKSUMS)) != checksum_text(files):
        changed = [name for name, data in files.items() if checksum_text({name: data}) not in found]
        raise _unusable(folder, "checksums differ", ", ".join(changed) or CHECKSUMS)
    try:
        values = tomllib.loads(files["kit.toml"].decode())
    except (ValueError, RecursionError):
        raise _unusable(folder, "kit.toml is not TOML", "") from None
    kit = parse(Kit, values, where=str(folder / "kit.toml"))
    if kit.site != site:
        raise _unusable(folder, "kit was made for another site", kit.site, site)
    return kit, files


def join(folder: Path, site: str, site_file: Path, *, digest: str | None, new_key: bool, now: dt.datetime) -> Joined:
    """Take a start kit: keep the CA, make the site's key here, write the site file if there is none, and the request.

    Parameters
    ----------
    folder
        The kit.
    site
        Name that the command gives.
    site_file
        Where the site file is or shall be; the other files go into a folder beside it.
    digest
        The kit's digest as the coordinator read it out, if it is to be compared here.
    new_key
        Whether to replace a key that is there, after the old one was revoked.
    now
        With time zone.

    Raises
    ------
    IcmoeError
        205, 306 and 307 for a key that is there and cannot be used, 308 and 309 for the CA, 310 for the kit, 325 where another
        `init` of the site is at work.
    """
    kit, files = read_kit(folder, site)
    if digest is not None and digest.replace(" ", "") != kit_digest(files).replace(" ", ""):
        raise _unusable(folder, "digest differs from the one given", kit_digest(files), digest)
    where = str(folder / "ca.crt")
    ca = parse_ca(files["ca.crt"], where=where)
    valid, fault = validity_fault(ca.not_valid_before_utc, ca.not_valid_after_utc, now, where=where)
    if fault is not None and not valid:
        raise IcmoeError(fault)
    own = site_file.parent / kit.site
    with file_errors(), _only_one(own):
        return _write(own, site_file, kit, files, ca, new_key=new_key)


def print_joined(site: str, joined: Joined) -> None:
    """Print what was made and what to do with it."""
    console = Console(highlight=False, soft_wrap=True)
    for path in joined.made:
        console.print(f"made {path}", markup=False)
    if joined.section:
        console.print(f"your site file is there already; let it say:\n{joined.section}", markup=False)
    console.print(f"kit digest       {joined.kit_digest}")
    console.print(f"key fingerprint  {joined.fingerprint}")
    console.print(f"Send {joined.request} to the coordinator and compare both by telephone; node.key stays here.", markup=False)
    console.print(f"Then fill in the site file and run: fl_client --site {site} check")


def _write(own: Path, site_file: Path, kit: Kit, files: dict[str, bytes], ca: x509.Certificate, *, new_key: bool) -> Joined:
    key_path, request = own / "node.key", own / "request.json"
    make_one = new_key or not key_path.exists()
    key = make_node_key(key_path) if make_one else read_node_key(key_path)
    write_atomically(own / "ca.crt", files["ca.crt"])
    write_atomically(request, make_request(kit.site, key, ca).model_dump_json(indent=1).encode())
    made = [own / "ca.crt", *([key_path] if make_one else []), request]
    section = SECTION.format(address=kit.address, site=kit.site)
    if not site_file.exists():
        text = SITE_FILE.format(site=kit.site, consortium=kit.consortium, section=section)
        write_atomically(site_file, text.encode(), private=True)
        made.append(site_file)
    missing = "" if _says(site_file, section) else section
    return Joined(request, fingerprint(key.public_key()), kit_digest(files), tuple(made), missing)


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Hold a site's folder: of two that make a key at once, one would print a fingerprint whose key is gone."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        what, todo = "another fl_client init is at work here", "Wait for it, and run this again."
        claim(held, Fault(number=325, where=str(folder), what=what, did="Nothing was made.", todo=todo))
        yield
    finally:
        os.close(held)


def _says(site_file: Path, section: str) -> bool:
    """Return whether the site file has this section already."""
    try:
        found = tomllib.loads(read_regular(site_file).decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return False  # `check` explains it
    wanted: dict[str, str] = tomllib.loads(section)["coordinator"]
    there = found.get("coordinator")
    return isinstance(there, dict) and all(there.get(key) == value for key, value in wanted.items())


def _unusable(folder: Path, what: str, value: str, limit: str = "") -> IcmoeError:
    return IcmoeError(Fault(number=310, where=str(folder), what=what, value=value, limit=limit, did="Nothing was made."))

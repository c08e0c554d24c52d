"""Provisioning: CA, server certificate and start kits in one folder; a second run keeps what is there.

Nothing is rewritten whose bytes would be the same, so that adding, renewing or revoking one site touches no other. The CA's
key signs server certificates only; between renewals it may lie on another, offline medium.
"""

from __future__ import annotations

import datetime as dt
import json
import secrets
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from rich.console import Console
from rich.table import Table

from fl_server.certificates import (
    belongs_to,
    ca_certificate,
    key_pem,
    make_key,
    missing_names,
    parse_key,
    server_certificate,
    signed_by,
)
from fl_server.consortium import read_consortium
from fl_server.home import Home, find_home
from icmoe.atomic import read_regular, write_atomically
from icmoe.errors import Fault, IcmoeError, print_faults
from icmoe.joining import CHECKSUMS, Kit, checksum_text, kit_digest, parse_certificate, validity_fault
from icmoe.private import read_private, read_small

RENEW_DAYS = 60


@dataclass(frozen=True, slots=True)
class Provisioned:
    """What a run of `provision` did.

    Parameters
    ----------
    changes
        One line per file made or renewed.
    kits
        Digest of each site's kit, to be read out to the hospital.
    notes
        What is about to expire or is not named in the consortium file any more.
    """

    changes: tuple[str, ...]
    kits: dict[str, str]
    notes: tuple[str, ...]


def provision(source: Path, folder: Path, *, renew: bool, now: dt.datetime) -> Provisioned:
    """Make what is missing below `folder`.

    Parameters
    ----------
    source
        The consortium file; a copy is kept.
    folder
        Made if absent, for the owner alone.
    renew
        Whether to renew certificates that end within 60 days, or that a clock that was ahead made for later.
    now
        With time zone.

    Raises
    ------
    IcmoeError
        201-205 for the file, 306-309 where a key or certificate that is there cannot be used.
    OSError
        Where the folder cannot be written to.
    """
    consortium = read_consortium(source)
    home = Home(folder, consortium)
    _make_folder(folder)
    changes: list[str] = []
    old = _certificate(home.signing_ca) if home.signing_ca.exists() else None
    ca = _provide_ca(home, now, changes, renew=renew)
    _provide_server(home, ca, now, changes, renew=renew)
    if not home.secret.exists() or not home.secret.stat().st_size:  # an empty one was cut off, and Flower takes none
        _write(home.secret, secrets.token_hex(32).encode(), changes, private=True)
    read_private(home.secret)
    kits = {name: _provide_kit(home, name, changes) for name in consortium.site_names}
    _write(home.file, read_regular(source), changes)
    gone = sorted({path.parent.name for path in (folder / "sites").glob("*/kit")} - set(consortium.site_names))
    notes = [f"{name} is not in {source.name} any more; its key works until: fl_server revoke {name}" for name in gone]
    if old is not None and old != ca:
        end = f"before {old.not_valid_after_utc:%Y-%m-%d}, the old one's end"
        soon = end if old.not_valid_before_utc <= now else "now: the old one is not valid yet"
        notes.append(f"the CA was renewed; hand out all kits again {soon}")
    return Provisioned(tuple(changes), kits, (*notes, *map(str, expiry_faults(folder, now))))


def expiry(folder: Path) -> dict[str, x509.Certificate]:
    """Return the consortium's certificates by name.

    Raises
    ------
    IcmoeError
        201-205 for the consortium's file, 205 where a certificate is not there, 308 where it is damaged.
    """
    home = find_home(folder)
    return {name: _certificate(path) for name, path in {"CA": home.ca, "server": home.certificate}.items()}


def expiry_faults(folder: Path, now: dt.datetime, *, warn_days: int = RENEW_DAYS) -> list[Fault]:
    """Return one fault per certificate that has ended or ends within `warn_days` days."""
    found = []
    for name, certificate in expiry(folder).items():
        dates = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        _, fault = validity_fault(*dates, now, where=f"{name} certificate", warn_days=warn_days)
        if fault is not None and now < dates[0]:
            fault = replace(fault, todo=f"{fault.todo} If it is right: fl_server provision --renew.")
        found += [fault] if fault is not None else []
    return found


def print_provisioned(done: Provisioned) -> None:
    """Print what was made, each kit's digest, and what to look at."""
    console = Console(highlight=False, soft_wrap=True)
    for path in done.changes:
        console.print(f"wrote {path}", markup=False)
    if not done.changes:
        console.print("everything was there; nothing was changed")
    for site, digest in done.kits.items():
        console.print(f"kit of {site}: digest {digest}", markup=False)
    for note in done.notes:
        console.print(f"note: {note}", markup=False)


def print_expiry(folder: Path, now: dt.datetime, *, warn_days: int, as_json: bool) -> bool:
    """Print when certificates end and return whether all of them last longer than `warn_days` days."""
    found, faults = expiry(folder), expiry_faults(folder, now, warn_days=warn_days)
    ends = {name: certificate.not_valid_after_utc for name, certificate in found.items()}
    if as_json:
        dates = {name: {"until": f"{end:%Y-%m-%dT%H:%M:%SZ}", "days": (end - now).days} for name, end in ends.items()}
        record = {"ok": not faults, "certificates": dates, "faults": [fault.record() for fault in faults]}
        sys.stdout.write(json.dumps(record, indent=1) + "\n")
        return not faults
    table = Table("certificate", "valid until", "days left")
    for name, end in ends.items():
        table.add_row(name, f"{end:%Y-%m-%d %H:%M} UTC", str((end - now).days))
    Console().print(table)
    print_faults(faults, stderr=False)
    return not faults


def _certificate(path: Path) -> x509.Certificate:
    data = read_small(path)
    try:
        return parse_certificate(data, where=str(path))
    except IcmoeError as error:  # whose usual remedy is to ask the coordinator
        todo = "Restore it from a backup, or remove it: fl_server provision makes it again."
        raise IcmoeError(replace(error.faults[0], todo=todo)) from None


def _make_folder(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for name in ("ca", "coordinator", "sites"):
        (folder / name).mkdir(exist_ok=True, mode=0o700)


def _write(path: Path, data: bytes, changes: list[str], *, private: bool = False) -> None:
    if not path.exists() or read_regular(path) != data:
        write_atomically(path, data, private=private)
        changes.append(str(path))


def _provide_ca(home: Home, now: dt.datetime, changes: list[str], *, renew: bool) -> x509.Certificate:
    if home.signing_ca.exists():
        ca = _certificate(home.signing_ca)
        if not (renew and _is_due(ca, now)):
            return ca
        key = _signing_key(home, ca)
    else:
        if not home.signing_key.exists():  # it is, after a run that was stopped between key and certificate
            _write(home.signing_key, key_pem(make_key()), changes, private=True)
        key = _ca_key(home)
    ca = ca_certificate(home.consortium.name, key, home.consortium.ca_valid_days, now)
    _write(home.signing_ca, ca.public_bytes(Encoding.PEM), changes)
    return ca


def _provide_server(home: Home, ca: x509.Certificate, now: dt.datetime, changes: list[str], *, renew: bool) -> None:
    path, key_path = home.certificate, home.key
    if not key_path.exists():
        _write(key_path, key_pem(make_key()), changes, private=True)
    key = parse_key(read_private(key_path), where=str(key_path))
    names = home.consortium.coordinator.certificate_names
    leaf = _certificate(path) if path.exists() else None
    fits = leaf is not None and belongs_to(leaf, key) and signed_by(leaf, ca) and not missing_names(leaf, names)
    if leaf is None or not fits or (renew and _is_due(leaf, now)):
        if ca.not_valid_after_utc - now < dt.timedelta(days=1):
            raise _ended(home.signing_ca, ca)
        leaf = server_certificate(names, key.public_key(), ca, _signing_key(home, ca), home.consortium.valid_days, now)
    _write(path, leaf.public_bytes(Encoding.PEM) + ca.public_bytes(Encoding.PEM), changes)
    _write(home.ca, ca.public_bytes(Encoding.PEM), changes)


def _provide_kit(home: Home, site: str, changes: list[str]) -> str:
    """Write a site's kit and return its digest."""
    kit = Kit(consortium=home.consortium.name, site=site, address=home.address)
    lines = [f"{key} = {json.dumps(value)}\n" for key, value in kit.model_dump().items()]
    files = {"kit.toml": "".join(lines).encode(), "ca.crt": read_small(home.signing_ca)}
    folder = home.site(site) / "kit"
    for name, data in {**files, CHECKSUMS: checksum_text(files)}.items():
        _write(folder / name, data, changes)
    return kit_digest(files)


def _signing_key(home: Home, ca: x509.Certificate) -> ec.EllipticCurvePrivateKey:
    key = _ca_key(home)
    if not belongs_to(ca, key):
        raise _mismatch(home.signing_ca)
    return key


def _ca_key(home: Home) -> ec.EllipticCurvePrivateKey:
    if not home.signing_key.exists():
        todo = "Put it back from where it is kept, for this command only."
        raise IcmoeError(
            Fault(
                number=205, where=str(home.signing_key), what="key of the CA is not there", did="Nothing was signed.", todo=todo
            )
        )
    return parse_key(read_private(home.signing_key), where=str(home.signing_key))


def _mismatch(path: Path) -> IcmoeError:
    what, todo = "certificate and key of the CA do not belong together", "Restore both from one backup."
    return IcmoeError(Fault(number=308, where=str(path), what=what, did="Nothing was signed.", todo=todo))


def _ended(path: Path, ca: x509.Certificate) -> IcmoeError:
    value = f"{ca.not_valid_after_utc:%Y-%m-%d}"
    return IcmoeError(Fault(number=309, where=str(path), what="CA has ended", value=value, did="Nothing was signed."))


def _is_due(certificate: x509.Certificate, now: dt.datetime) -> bool:
    """Return whether a certificate ends soon, or was made by a clock that was ahead."""
    return certificate.not_valid_after_utc - now < dt.timedelta(days=RENEW_DAYS) or certificate.not_valid_before_utc > now

"""Names for what must not be named: HMAC-SHA-256 under a secret that each site makes for itself and never sends.

Without the secret nobody can try patient numbers against the pseudonyms; losing it makes every patient a new one.
"""

from __future__ import annotations

import hmac
import os
import re
import secrets
from pathlib import Path

from icmoe.atomic import read_regular, write_atomically
from icmoe.data.ingest.folding import folded
from icmoe.data.ingest.index import INDEX
from icmoe.errors import Fault, IcmoeError

SECRET_FILE = "secret.key"  # noqa: S105  # a file name
SECRET_BYTES = 32
DIGITS = 16
FORGOTTEN = "forgotten"
"""Folder beside the secret with one empty file per forgotten patient: it outlives every index and holds for every study."""


class Pseudonyms:
    """Keyed hashes of one site.

    Parameters
    ----------
    secret
        At least `SECRET_BYTES` bytes.
    """

    def __init__(self, secret: bytes) -> None:
        if len(secret) < SECRET_BYTES:
            raise ValueError(f"a secret of {SECRET_BYTES} bytes is needed, not {len(secret)}")
        self.secret = secret

    def of(self, kind: str, text: str) -> str:
        """Return the hash of `text`, 16 hexadecimal digits; equal texts of two kinds have unrelated hashes."""
        message = f"{kind}\0{text}".encode("utf-8", "surrogateescape")
        return hmac.digest(self.secret, message, "sha256").hex()[:DIGITS]

    def patient(self, text: str) -> str:
        """Return the pseudonym of a patient, such as P-0123456789abcdef; equal ones for names that are `folded` alike."""
        return f"P-{self.of('patient', folded(text))}"

    def share(self, patient: str) -> float:
        """Return a number in [0, 1) that belongs to a pseudonym for good."""
        return int(self.of("split", patient), 16) / 16.0**DIGITS


def site_pseudonyms(folder: Path) -> Pseudonyms:
    """Return the site's keyed hashes; the first call makes the secret, readable by its owner alone.

    Raises
    ------
    IcmoeError
        129 where the secret cannot be read, is damaged or lost, or others may read it.
    """
    path = folder / SECRET_FILE
    try:
        if not path.exists():
            if any((folder / FORGOTTEN).glob("P-*")) or any(folder.glob(f"*/{INDEX}")):
                what = "secret of the site is lost, though its ingest is there"
                todo = (
                    "Restore it from a backup. With another, patients may change from test to training, and forgotten ones come "
                    "back: to accept that, move this folder away and forget them again."
                )
                raise IcmoeError(_fault(path, what, "", todo=todo))
            write_atomically(path, secrets.token_bytes(SECRET_BYTES), private=True)
        secret, mode = read_regular(path), path.stat().st_mode & 0o077
    except OSError as error:
        raise IcmoeError(_fault(path, "secret of the site cannot be read", error.strerror or "")) from None
    if len(secret) != SECRET_BYTES:
        raise IcmoeError(_fault(path, "secret of the site is damaged", f"{len(secret)} bytes", str(SECRET_BYTES)))
    if mode and os.name == "posix":
        raise IcmoeError(_fault(path, "others may read the secret of the site", f"{mode:03o}", "000", f"chmod 600 {path}"))
    return Pseudonyms(secret)


def pseudonym_of(patient: str, hashes: Pseudonyms) -> str:
    """Return the pseudonym of a patient who is named by it, or by the hospital's own number."""
    plain = folded(patient)
    return f"P-{plain[2:]}" if re.fullmatch(rf"p-[0-9a-f]{{{DIGITS}}}", plain) else hashes.patient(patient)


def forget_name(folder: Path, patient: str) -> None:
    """Note that a patient is not to be read again, whatever becomes of the indexes.

    Raises
    ------
    IcmoeError
        129 where that cannot be written.
    """
    path = folder / FORGOTTEN / patient
    try:
        write_atomically(path, b"", private=True)
    except OSError as error:
        raise IcmoeError(_fault(path.parent, "list of forgotten patients cannot be written", error.strerror or "")) from None


def forgotten(folder: Path) -> list[str]:
    """Return the pseudonyms of the patients who are not to be read again, sorted."""
    return sorted(path.name for path in (folder / FORGOTTEN).glob("P-*"))


def _fault(path: Path, what: str, value: str, limit: str = "", todo: str = "") -> Fault:
    return Fault(number=129, where=str(path), what=what, value=value, limit=limit, did="Nothing was read.", todo=todo)

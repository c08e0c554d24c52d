"""What a hospital and a coordinator hand each other before they are connected: the start kit and the request to join.

A kit holds nothing secret: address and CA. A request holds the site's public key and a signature that proves the private
one is at hand, over the site's name and the CA's key, so that it counts in one consortium for one name only. Neither says
who handed it over: both ends print a digest to be compared by another way, such as the telephone.
"""

from __future__ import annotations

import base64
import datetime as dt
import hashlib
import json
import re
from typing import Annotated, Any, Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_ssh_public_key,
    ssh_key_fingerprint,
)
from pydantic import AfterValidator, Field

from icmoe.config import Section, parse
from icmoe.errors import Fault, IcmoeError

KIT_FILES = ("ca.crt", "kit.toml")
CHECKSUMS = "SHA256SUMS"
WARN_DAYS = 30
# What damaged keys and certificates raise.
UNREADABLE = (
    *(ValueError, TypeError, NotImplementedError, UnsupportedAlgorithm),
    *(x509.InvalidVersion, x509.DuplicateExtension, x509.UnsupportedGeneralNameType),
)
SiteName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,31}$")]
ConsortiumName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]{0,63}$")]
_LABEL = r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9])?"
_ADDRESS = re.compile(rf"(?P<host>(?=[^:]{{1,253}}:){_LABEL}(\.{_LABEL})*|\[[0-9A-Fa-f:.]+\]):(?P<port>\d{{1,5}})")


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of "host:port"; an IPv6 address stands in square brackets and is returned without.

    Raises
    ------
    ValueError
        Where it is anything else, a URL for example.
    """
    found = _ADDRESS.fullmatch(address)
    if found is None or not 1 <= int(found["port"]) <= 65_535:
        raise ValueError("host:port, without https:// and path")
    return found["host"].strip("[]"), int(found["port"])


def _valid_address(address: str) -> str:
    split_address(address)
    return address


Address = Annotated[str, AfterValidator(_valid_address)]


class Kit(Section):
    """What `kit.toml` says."""

    schema_version: Literal[1] = 1
    """Layout of the kit."""
    consortium: ConsortiumName
    """Name of the consortium."""
    site: SiteName
    """Name that the site has in it."""
    address: Address
    """Public address of the coordinator, host:port."""


class JoinRequest(Section):
    """What a site sends to be admitted; nothing in it is secret."""

    schema_version: Literal[1] = 1
    """Layout of the request."""
    site: SiteName
    """Name that the key shall have."""
    public_key: str
    """The site's public key, OpenSSH format."""
    ca: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """SHA-256 of the public key of the CA that the site trusts."""
    proof: Annotated[str, Field(max_length=400)]
    """Signature over the rest, base64."""


def make_request(site: str, key: ec.EllipticCurvePrivateKey, ca: x509.Certificate) -> JoinRequest:
    """Return the signed request of a site."""
    public_key = public_text(key.public_key())
    proof = key.sign(_signed(site, public_key, key_digest(ca)), ec.ECDSA(hashes.SHA256()))
    return JoinRequest(site=site, public_key=public_key, ca=key_digest(ca), proof=base64.b64encode(proof).decode())


def parse_request(data: bytes, *, where: str) -> JoinRequest:
    """Return the request in `data`.

    Raises
    ------
    IcmoeError
        310 where it is not JSON, 201-203 where keys are wrong.
    """
    try:
        values: Any = json.loads(data)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise IcmoeError(
            Fault(number=310, where=where, limit="request.json as fl_client init wrote it", did="Nothing was admitted.")
        )
    return parse(JoinRequest, values, where=where)


def proven_key(request: JoinRequest, *, where: str) -> ec.EllipticCurvePublicKey:
    """Return the request's public key if the signature proves that its private key made the request.

    Raises
    ------
    IcmoeError
        307 where the key is of the wrong kind, 310 where the signature does not fit.
    """
    try:
        key = load_ssh_public_key(request.public_key.encode())
    except UNREADABLE:
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise IcmoeError(Fault(number=307, where=where, value=request.public_key.split(" ")[0][:40], did="Nothing was admitted."))
    try:
        proof = base64.b64decode(request.proof, validate=True)
        key.verify(proof, _signed(request.site, request.public_key, request.ca), ec.ECDSA(hashes.SHA256()))
    except (ValueError, InvalidSignature):
        what = "signature does not fit site, key and CA of the request"
        raise IcmoeError(Fault(number=310, where=where, what=what, value=request.site, did="Nothing was admitted.")) from None
    return key


def public_text(key: ec.EllipticCurvePublicKey) -> str:
    """Return a public key in OpenSSH format."""
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def fingerprint(key: ec.EllipticCurvePublicKey) -> str:
    """Return the fingerprint of a key as `ssh-keygen -l` prints it."""
    return "SHA256:" + base64.b64encode(ssh_key_fingerprint(key, hashes.SHA256())).decode().rstrip("=")


def key_digest(certificate: x509.Certificate) -> str:
    """Return the SHA-256 of a certificate's public key; it outlives a renewal of the certificate."""
    spki = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(spki).hexdigest()


def parse_certificate(data: bytes, *, where: str) -> x509.Certificate:
    """Return the first certificate of a PEM file.

    Raises
    ------
    IcmoeError
        308 where there is none.
    """
    try:
        certificate = x509.load_pem_x509_certificate(data)
        # Read now what is otherwise read, and found damaged, only when it is used.
        _ = (certificate.public_key(), certificate.extensions, certificate.not_valid_before_utc, certificate.not_valid_after_utc)
        return certificate
    except UNREADABLE:
        fault = Fault(number=308, where=where, what="file is not a certificate in PEM format", did="It was not used.")
        raise IcmoeError(fault) from None


def validity_fault(
    start: dt.datetime, end: dt.datetime, now: dt.datetime, *, where: str, warn_days: int = WARN_DAYS
) -> tuple[bool, Fault | None]:
    """Return whether `now` lies between the dates of a certificate, and what to say about it, None if nothing.

    Parameters
    ----------
    start, end, now
        With time zone.
    where
        Name of the certificate.
    warn_days
        How many days before its end a certificate is reported.
    """
    dates = f"{start:%Y-%m-%d %H:%M} to {end:%Y-%m-%d %H:%M} UTC"
    if now < start:
        what, value = "certificate is not valid yet", f"now {now:%Y-%m-%d %H:%M} UTC"
        return False, Fault(number=309, where=where, what=what, value=value, limit=dates, todo="Set this machine's clock.")
    if now >= end:
        return False, Fault(number=309, where=where, what="certificate has expired", value=f"{end:%Y-%m-%d %H:%M} UTC")
    days = (end - now).days
    if days < warn_days:
        value = f"{days} days left, until {end:%Y-%m-%d}"
        return True, Fault(number=309, where=where, what="certificate expires soon", value=value)
    return True, None


def checksum_text(files: dict[str, bytes]) -> bytes:
    """Return the lines that `sha256sum` writes for these files, by name."""
    return "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in sorted(files.items())).encode()


def kit_digest(files: dict[str, bytes]) -> str:
    """Return one digest over a whole kit, short enough to be read out: SHA-256 of its checksum file, in groups of four."""
    digest = hashlib.sha256(checksum_text(files)).hexdigest()[:32]
    return " ".join(digest[at : at + 4] for at in range(0, 32, 4))


def _signed(site: str, public_key: str, ca: str) -> bytes:
    return json.dumps(["icmoe-join-1", site, public_key, ca]).encode()

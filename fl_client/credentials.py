"""How a site reaches and recognises the coordinator, and the key by which the coordinator recognises the site."""

from __future__ import annotations

from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_ssh_private_key

from icmoe.atomic import write_atomically
from icmoe.config import PathText, Section
from icmoe.errors import Fault, IcmoeError
from icmoe.joining import UNREADABLE, Address, parse_certificate
from icmoe.private import read_private


class Coordinator(Section):
    """Section [coordinator] of the site file; paths are relative to the file."""

    address: Address
    """Public host:port of the coordinator."""
    ca: PathText
    """Certificate of the consortium's CA, from the start kit."""
    key: PathText
    """The site's private key; it never leaves."""
    health: Address | None = None
    """host:port of a gRPC health server (Flower's --health-server-address, no TLS), asked by `check` where given."""


def make_node_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Write a new private key, ECDSA P-384, OpenSSH format, no passphrase, for the owner alone, and return it."""
    key = ec.generate_private_key(ec.SECP384R1())
    write_atomically(path, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()), private=True)
    return key


def read_node_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Return the site's private key.

    Raises
    ------
    IcmoeError
        205 where it cannot be read, 306 where others could read it, 307 where Flower could not use it.
    """
    data = read_private(path)
    found = "unknown"
    try:
        key = load_ssh_private_key(data, password=None)
        found = type(key).__name__.removesuffix("PrivateKey").lstrip("_")
    except TypeError:
        key, found = None, "encrypted by a passphrase"
    except UNREADABLE:
        key, found = None, "PEM, not OpenSSH" if b"BEGIN" in data and b"OPENSSH" not in data else "not a private key"
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise IcmoeError(Fault(number=307, where=str(path), value=found, did="It was not used."))
    return key


def parse_ca(data: bytes, *, where: str) -> x509.Certificate:
    """Return the certificate of the consortium's CA.

    Raises
    ------
    IcmoeError
        308 where it is not the certificate of a CA.
    """
    certificate = parse_certificate(data, where=where)
    try:
        is_ca = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (x509.ExtensionNotFound, ValueError):
        is_ca = False
    if not is_ca:
        raise IcmoeError(Fault(number=308, where=where, what="certificate is not that of a CA", did="It was not used."))
    return certificate

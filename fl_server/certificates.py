"""The consortium's CA and the coordinator's server certificate: ECDSA P-384, X.509 v3, nothing that a strict verifier refuses.

A renewed CA keeps its key and its name, so what it signs is trusted by sites that still hold the old CA certificate.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
from collections.abc import Sequence

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from icmoe.errors import Fault, IcmoeError
from icmoe.joining import UNREADABLE

EARLIER = dt.timedelta(hours=1)  # valid a little before it is made: clocks differ
_NO_USAGE = dict.fromkeys(
    (
        "digital_signature",
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
        "key_cert_sign",
        "crl_sign",
        "encipher_only",
        "decipher_only",
    ),
    False,
)


def make_key() -> ec.EllipticCurvePrivateKey:
    """Return a new private key."""
    return ec.generate_private_key(ec.SECP384R1())


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return a private key as unencrypted PEM, as nginx and Flower read it."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def parse_key(data: bytes, *, where: str) -> ec.EllipticCurvePrivateKey:
    """Return the private key of a PEM file.

    Raises
    ------
    IcmoeError
        307 where it is of another kind.
    """
    try:
        key = load_pem_private_key(data, password=None)
    except UNREADABLE:
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        limit, todo = "an unencrypted EC key in PEM format", "Restore the file from its backup."
        raise IcmoeError(Fault(number=307, where=where, limit=limit, did="Nothing was changed.", todo=todo))
    return key


def ca_certificate(name: str, key: ec.EllipticCurvePrivateKey, days: int, now: dt.datetime) -> x509.Certificate:
    """Return a self-signed CA certificate.

    Parameters
    ----------
    name
        The consortium's.
    key
        The CA's; the same one when it is renewed.
    days
        Life from `now`.
    now
        With time zone.
    """
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{name} CA")])
    builder = _builder(subject, subject, key.public_key(), key, days, now)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    usage = x509.KeyUsage(**{**_NO_USAGE, "key_cert_sign": True, "crl_sign": True})
    return builder.add_extension(usage, critical=True).sign(key, hashes.SHA384())


def server_certificate(
    names: Sequence[str],
    key: ec.EllipticCurvePublicKey,
    ca: x509.Certificate,
    ca_key: ec.EllipticCurvePrivateKey,
    days: int,
    now: dt.datetime,
) -> x509.Certificate:
    """Return the coordinator's certificate.

    Parameters
    ----------
    names
        Host names and IP addresses; the first also stands in the subject.
    key
        The coordinator's public key.
    ca, ca_key
        Who signs.
    days
        Life from `now`, cut at the CA's own end.
    now
        With time zone.
    """
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0][:64])])
    days = min(days, (ca.not_valid_after_utc - now).days)
    builder = _builder(subject, ca.subject, key, ca_key, days, now)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(x509.KeyUsage(**{**_NO_USAGE, "digital_signature": True}), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    alternatives = x509.SubjectAlternativeName([_general_name(name) for name in names])
    return builder.add_extension(alternatives, critical=False).sign(ca_key, hashes.SHA384())


def missing_names(certificate: x509.Certificate, names: Sequence[str]) -> set[str]:
    """Return the host names and IP addresses that the certificate does not carry."""
    try:
        found = set(certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except x509.ExtensionNotFound:
        found = set()
    return {name for name in names if _general_name(name) not in found}


def belongs_to(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> bool:
    """Return whether the certificate is of this key."""
    return certificate.public_key() == key.public_key()


def signed_by(certificate: x509.Certificate, ca: x509.Certificate) -> bool:
    """Return whether the CA signed the certificate."""
    try:
        certificate.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    issuer_key: ec.EllipticCurvePrivateKey,
    days: int,
    now: dt.datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - EARLIER)
        .not_valid_after(now + dt.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)

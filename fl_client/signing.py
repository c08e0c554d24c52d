"""Signatures of a site's records by the key that the site made for the federation.

`cryptography` is imported where something is signed or checked, not when a ClientApp process starts.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from pathlib import Path

PURPOSE = b"icmoe audit log\0"
"""What a signature is for: the same key also answers the coordinator and signs requests to join."""


@dataclass(frozen=True, slots=True)
class Signer:
    """The site's private key, read when it is used.

    Parameters
    ----------
    path
        The key file.
    """

    path: Path

    def public(self) -> str:
        """Return the public key in OpenSSH format.

        Raises
        ------
        IcmoeError
            205, 306 or 307 where the key cannot be used.
        """
        from fl_client.credentials import read_node_key
        from icmoe.joining import public_text

        return public_text(read_node_key(self.path).public_key())

    def sign(self, digest: str) -> str:
        """Return the signature of a hexadecimal digest, base64.

        Raises
        ------
        IcmoeError
            205, 306 or 307 where the key cannot be used.
        """
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec

        from fl_client.credentials import read_node_key

        return base64.b64encode(read_node_key(self.path).sign(_signed(digest), ec.ECDSA(hashes.SHA256()))).decode()


def signature_holds(public: str, digest: str, signature: object) -> bool:
    """Return whether `signature` is that of `digest` by the private key of `public`; whatever is malformed is not."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_ssh_public_key

    from icmoe.joining import UNREADABLE

    try:
        key = load_ssh_public_key(public.encode())
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(signature, str):
            return False
        key.verify(base64.b64decode(signature, validate=True), _signed(digest), ec.ECDSA(hashes.SHA256()))
    except (InvalidSignature, *UNREADABLE):
        return False
    return True


def fingerprint_of(public: str) -> str:
    """Return the fingerprint of a public key in OpenSSH format, as `ssh-keygen -l` prints it."""
    words = public.split()
    data = base64.b64decode(words[1]) if len(words) > 1 else b""
    return "SHA256:" + base64.b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")


def _signed(digest: str) -> bytes:
    return PURPOSE + bytes.fromhex(digest)

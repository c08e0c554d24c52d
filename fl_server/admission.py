"""Admission of sites: a proven key gets the site's name at the SuperLink; revocation takes it away for good."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_public_key

from fl_server.flower_private import Refused, Registry
from fl_server.home import Home, find_home
from icmoe.atomic import write_atomically
from icmoe.errors import Fault, IcmoeError
from icmoe.joining import (
    UNREADABLE,
    JoinRequest,
    fingerprint,
    key_digest,
    parse_certificate,
    parse_request,
    proven_key,
    public_text,
)
from icmoe.private import read_small


@dataclass(frozen=True, slots=True)
class Admission:
    """An admitted site.

    Parameters
    ----------
    site
        Its name.
    fingerprint
        Of its key, as the site printed it.
    node_id
        The number that Flower gave it.
    """

    site: str
    fingerprint: str
    node_id: int


def admit(path: Path, folder: Path, *, expected: str | None = None) -> Admission:
    """Register a site's key under the site's name; asking twice changes nothing.

    Parameters
    ----------
    path
        The request that the site sent.
    folder
        The provisioned folder.
    expected
        Fingerprint that the hospital read out, if it is to be compared here.

    Raises
    ------
    IcmoeError
        205 and 310 for an unreadable request, 307 for a key of the wrong kind, 314 where it may not be admitted, 311 where
        the SuperLink cannot be reached.
    """
    home = find_home(folder)
    request = parse_request(read_small(path), where=str(path))
    key = proven_key(request, where=str(path))
    _refuse_strangers(home, request, key, path, expected)
    with _registry(home) as registry:
        found = registry.find(key)
        node_id = found[0] if found is not None else _registered(registry, request, key, path)
    if found is not None and found[1] == "unregistered":
        raise _refusal(path, "key has been revoked", request.site, "a key that was never registered")
    write_atomically(home.public_key(request.site), (public_text(key) + "\n").encode())
    return Admission(request.site, fingerprint(key), node_id)


def revoke(name: str, folder: Path) -> str:
    """Take a site's key out of the federation, keep it as revoked and return its fingerprint.

    Raises
    ------
    IcmoeError
        314 where the site has no admitted key, 311 where the SuperLink cannot be reached: then nothing changed.
    """
    home = find_home(folder)
    path = home.public_key(name)
    if not path.exists():
        admitted = sorted(found.parent.name for found in (home.root / "sites").glob("*/node.pub"))
        raise _refusal(path, "site has no admitted key", name, ", ".join(admitted) or "none")
    key = _public_key(path)
    with _registry(home) as registry:
        found = registry.find(key)
        if found is not None and found[1] != "unregistered":
            registry.unregister(found[0])
    revoked = home.site(name) / "revoked" / f"{fingerprint(key).removeprefix('SHA256:').replace('/', '_')}.pub"
    revoked.parent.mkdir(exist_ok=True)
    path.replace(revoked)
    return fingerprint(key)


def _refuse_strangers(
    home: Home,
    request: JoinRequest,
    key: ec.EllipticCurvePublicKey,
    path: Path,
    expected: str | None,
) -> None:
    ca = parse_certificate(read_small(home.ca), where=str(home.ca))
    if request.site not in home.consortium.site_names:
        raise _refusal(path, "site is not in the consortium", request.site, ", ".join(home.consortium.site_names))
    if request.ca != key_digest(ca):
        raise _refusal(path, "request was made for another consortium's CA", request.ca[:16], key_digest(ca)[:16])
    if expected is not None and expected != fingerprint(key):
        raise _refusal(path, "fingerprint differs from the one given", fingerprint(key), expected)
    if any(_public_key(old) == key for old in (home.root / "sites").glob("*/revoked/*.pub")):
        raise _refusal(path, "key has been revoked", fingerprint(key), "a key that was never registered")
    for other in sorted((home.root / "sites").glob("*/node.pub")):
        same_site, same_key = other.parent.name == request.site, _public_key(other) == key
        if same_site != same_key:
            what = "another key is admitted for this site" if same_site else "key is admitted for another site"
            raise _refusal(path, what, fingerprint(key), fingerprint(_public_key(other)))


def _public_key(path: Path) -> ec.EllipticCurvePublicKey:
    try:
        key = load_ssh_public_key(read_small(path))
    except UNREADABLE:
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise IcmoeError(Fault(number=307, where=str(path), did="Nothing was changed.", todo="Restore the file from its backup."))
    return key


def _registered(registry: Registry, request: JoinRequest, key: ec.EllipticCurvePublicKey, path: Path) -> int:
    try:
        return registry.register(key, request.site)
    except Refused as refused:
        raise _refusal(path, "Flower refused the key", f"code {refused.code}", "a key that was never registered") from None


@contextmanager
def _registry(home: Home) -> Iterator[Registry]:
    port = home.superlink_port
    registry = Registry(port, read_small(home.ca))
    try:
        yield registry
    except httpx.HTTPError as error:
        what = "SuperLink cannot be reached"
        todo = "Start it on this machine, then repeat the command; behind a proxy NO_PROXY must name 127.0.0.1."
        where, value = f"127.0.0.1:{port}", type(error).__name__
        raise IcmoeError(Fault(number=311, where=where, what=what, value=value, did="Nothing was changed.", todo=todo)) from None
    finally:
        registry.close()


def _refusal(path: Path, what: str, value: str, limit: str) -> IcmoeError:
    todo = "Compare with the hospital by telephone; to replace a key: fl_server revoke NAME, then a new request."
    return IcmoeError(
        Fault(number=314, where=str(path), what=what, value=value, limit=limit, did="Nothing was changed.", todo=todo)
    )

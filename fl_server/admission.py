"""Admission of sites: a proven key gets the site's name at the SuperLink; revocation takes it away for good."""

from __future__ import annotations

import os
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
from icmoe.locks import hold
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
    """Write a site's key down and register it under the site's name; asking twice changes nothing.

    In this order no key is live that `revoke` does not know of, whenever the command is ended.

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
    with _alone(home), _registry(home) as registry:
        _refuse_strangers(home, request, key, path, expected)
        found = registry.find(key)
        if found is not None and found[1] == "unregistered":
            raise _refusal(path, "key has been revoked", request.site, "a key that was never registered")
        for other in registry.live(request.site).values():
            if other != key:
                raise _refusal(path, "another key is registered for this site", fingerprint(key), fingerprint(other))
        written = home.public_key(request.site)
        is_new = not written.exists()
        write_atomically(written, (public_text(key) + "\n").encode())
        try:
            node_id = found[0] if found is not None else registry.register(key, request.site)
        except Refused as refused:
            if is_new:
                written.unlink()
            value = f"code {refused.code}"
            raise _refusal(path, "Flower refused the key", value, "a key that was never registered") from None
    return Admission(request.site, fingerprint(key), node_id)


def revoke(name: str, folder: Path) -> str:
    """Take a site's key out of the federation, keep it as revoked and return its fingerprint.

    So is every other key that is registered under the site's name, as where the file of one was lost.

    Raises
    ------
    IcmoeError
        314 where the site has no admitted key, 311 where the SuperLink cannot be reached: then its file stays.
    """
    home = find_home(folder)
    path = home.public_key(name)
    with _alone(home):
        keys = [_public_key(path)] if path.exists() else []
        try:
            keys += [key for key in _unregistered(home, name, keys) if key not in keys]
        except IcmoeError:
            if keys:
                raise  # without a key on file the site counts as not admitted, also where the SuperLink cannot say
        if not keys:
            admitted = sorted(found.parent.name for found in (home.root / "sites").glob("*/node.pub"))
            raise _refusal(path, "site has no admitted key", name, ", ".join(admitted) or "none")
        for key in keys:
            revoked = home.site(name) / "revoked" / f"{fingerprint(key).removeprefix('SHA256:').replace('/', '_')}.pub"
            write_atomically(revoked, (public_text(key) + "\n").encode())
        path.unlink(missing_ok=True)
    return ", ".join(map(fingerprint, keys))


def _unregistered(home: Home, name: str, keys: list[ec.EllipticCurvePublicKey]) -> list[ec.EllipticCurvePublicKey]:
    """Take these keys and all under the name out of the SuperLink; return the latter."""
    with _registry(home) as registry:
        live = registry.live(name)
        known = [found for key in keys if (found := registry.find(key)) is not None]
        for number in {*live, *(number for number, status in known if status != "unregistered")}:
            registry.unregister(number)
    return list(live.values())


@contextmanager
def _alone(home: Home) -> Iterator[None]:
    """Hold the register: of two people who admit two keys for one site, the second is refused."""
    held = os.open(home.root, os.O_RDONLY | os.O_DIRECTORY)  # a file for it would be left behind by whoever is refused
    try:
        hold(held, name=home.root)
        yield
    finally:
        os.close(held)


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


@contextmanager
def _registry(home: Home) -> Iterator[Registry]:
    port = home.superlink_port
    registry = Registry(port, read_small(home.ca))
    try:
        yield registry
    except httpx.HTTPError as error:
        what = "SuperLink cannot be reached"
        todo = "Start it on this machine, then repeat the command; behind a proxy NO_PROXY must name 127.0.0.1."
        where, value, did = f"127.0.0.1:{port}", type(error).__name__, "No key is live that is not written down."
        raise IcmoeError(Fault(number=311, where=where, what=what, value=value, did=did, todo=todo)) from None
    finally:
        registry.close()


def _refusal(path: Path, what: str, value: str, limit: str) -> IcmoeError:
    todo = "Compare with the hospital by telephone; to replace a key: fl_server revoke NAME, then a new request."
    return IcmoeError(
        Fault(number=314, where=str(path), what=what, value=value, limit=limit, did="Nothing was changed.", todo=todo)
    )

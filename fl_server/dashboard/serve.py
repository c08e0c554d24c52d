"""The page as a process: where it listens, under which names, by TLS or not, and what is printed once."""

from __future__ import annotations

import errno
import ipaddress
import secrets
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from fl_server.dashboard.app import make_app
from fl_server.dashboard.door import LOOPBACK, TOKEN, Door
from fl_server.dashboard.feed import Feed, unknown
from fl_server.dashboard.references import read_references
from fl_server.home import Home, find_home
from icmoe.errors import NOT_STARTED, Fault, IcmoeError
from icmoe.private import read_private

MOST_CONNECTIONS = 100
LAST_WORDS_S = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Listening:
    """Where and how the page is offered.

    Parameters
    ----------
    host
        Name or address to listen on.
    port
        0 takes a free one.
    allowed
        Further names that it is asked for under, such as a proxy's.
    with_token
        Whether a token is needed on loopback too; beyond it always is.
    plain
        Whether it goes without TLS beyond loopback.
    """

    host: str
    port: int
    allowed: Sequence[str] = ()
    with_token: bool = False
    plain: bool = False


def serve(root: Path, study: str | None, listening: Listening, *, results: Path | None) -> None:
    """Show the page until the process is stopped.

    Parameters
    ----------
    root
        The coordinator's folder.
    study
        Name or folder of the one study to show; all where absent.
    listening
        Where and how.
    results
        results.json of a rehearsal, for reference lines.

    Raises
    ------
    IcmoeError
        201-205 for consortium.toml, 202 for host or port, 306 and 326 for certificate and key, 329 where the port is in use,
        523 for the rehearsal, 524 for the study.
    """
    home = find_home(root)
    feed = Feed(home, study, None if results is None else read_references(results))
    if study is not None and not feed.folders():
        raise unknown(study, tuple(folder.path.name for folder in Feed(home).folders()))
    with bound(listening.host, listening.port) as listener:
        local = ipaddress.ip_address(listener.getsockname()[0]).is_loopback
        tls = _tls(home) if not local and not listening.plain else {}
        token = secrets.token_urlsafe(32) if listening.with_token or not local else None
        door = Door(
            make_app(feed),
            names=own_names(home, listening, local=local),
            any_address=not local,
            token=token,
            port=listener.getsockname()[1],
            secure=bool(tls),
        )
        sys.stdout.write(greeting(home, listening, listener, token, tls=bool(tls), local=local))
        sys.stdout.flush()
        _run(door, listener, tls)


def bound(host: str, port: int) -> socket.socket:
    """Return a listening socket.

    Raises
    ------
    IcmoeError
        329 where the port is in use, 202 where host or port cannot be listened on.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise IcmoeError(Fault(number=202, where="--host", value=host, limit=str(error), did=NOT_STARTED)) from None
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(MOST_CONNECTIONS)
    except OSError as error:
        listener.close()
        value, todo = f"{host}:{port}", "Choose another --port."
        if error.errno == errno.EADDRINUSE:
            raise IcmoeError(Fault(number=329, value=value, did=NOT_STARTED, todo=todo)) from None
        limit = error.strerror or ""
        raise IcmoeError(Fault(number=202, where="--host and --port", value=value, limit=limit, did=NOT_STARTED)) from None
    return listener


def own_names(home: Home, listening: Listening, *, local: bool) -> set[str]:
    """Return the names under which the page answers, in small letters."""
    beyond = set() if local else {listening.host, *home.consortium.coordinator.certificate_names}
    return {name.strip("[]").lower() for name in {*LOOPBACK, *beyond, *listening.allowed}}


def greeting(home: Home, listening: Listening, listener: socket.socket, token: str | None, *, tls: bool, local: bool) -> str:
    """Return what is printed at the start; the token is in it and nowhere else."""
    host, port = listener.getsockname()[:2]
    name = home.consortium.coordinator.certificate_names[0] if ipaddress.ip_address(host).is_unspecified else listening.host
    name = f"[{name}]" if ":" in name else name
    lines = [f"{'https' if tls else 'http'}://{name}:{port}/" + (f"?{TOKEN}={token}" if token else "")]
    if token:
        lines.append("Whoever has this address sees the page; it is printed once and changes with each start.")
    if not local and not tls:
        lines.append("Without TLS, token and page can be read on the way.")
    return "\n".join(lines) + "\n"


def _tls(home: Home) -> dict[str, str]:
    """Return certificate and key of the coordinator, which its sites' browsers can be taught to trust."""
    missing = [path for path in (home.certificate, home.key) if not path.is_file()]
    if missing:
        todo = "Run fl_server provision, or give --http where TLS ends elsewhere."
        raise IcmoeError(*(Fault(number=326, where=str(path), did=NOT_STARTED, todo=todo) for path in missing))
    read_private(home.key)
    return {"ssl_certfile": str(home.certificate), "ssl_keyfile": str(home.key)}


def _run(door: Door, listener: socket.socket, tls: dict[str, str]) -> None:
    """Serve; addresses are not logged, for the token is in one of them."""
    settings = uvicorn.Config(
        door,
        http="h11",
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=MOST_CONNECTIONS,
        timeout_keep_alive=10,
        timeout_graceful_shutdown=LAST_WORDS_S,
        ssl_certfile=tls.get("ssl_certfile"),
        ssl_keyfile=tls.get("ssl_keyfile"),
    )
    with suppress(KeyboardInterrupt):
        uvicorn.Server(settings).run(sockets=[listener])

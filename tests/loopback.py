"""Real servers on loopback for the tests of the connection: TLS with any certificate, and ports that speak something else."""

from __future__ import annotations

import datetime as dt
import json
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import Encoding

from fl_server.certificates import ca_certificate, key_pem, make_key, server_certificate
from icmoe.processes import free_port

NOW = dt.datetime.now(tz=dt.UTC)
HOSTS = ("localhost", "127.0.0.1")
FLEET = {
    "/v1/fleet/pull-messages": (401, {"detail": "Invalid SuperNode authentication"}),
    "/v1/fleet/activate-node": (400, {"code": 2003, "detail": "Invalid heartbeat interval."}),
}


class Authority:
    """A CA of a test and what it signs, as files below `folder`."""

    def __init__(self, folder: Path, days: int = 3650) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.key = folder, make_key()
        self.certificate = ca_certificate("test", self.key, days, NOW - dt.timedelta(days=400))
        self.path = folder / "ca.crt"
        self.path.write_bytes(self.certificate.public_bytes(Encoding.PEM))

    def server(self, *names: str, days: int = 365, now: dt.datetime = NOW) -> ssl.SSLContext:
        key = make_key()
        leaf = server_certificate(names, key.public_key(), self.certificate, self.key, days, now)
        path = self.folder / f"{leaf.serial_number}.pem"
        path.write_bytes(leaf.public_bytes(Encoding.PEM) + key_pem(key))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(path)
        return context


@contextmanager
def http_server(
    answers: dict[str, tuple[int, Any]] = FLEET, *, tls: ssl.SSLContext | None, ahead_s: float = 0.0
) -> Iterator[tuple[int, list[str]]]:
    """Serve the answers by path, 404 elsewhere, and say which lines were asked; a status of 0 closes the connection.

    `ahead_s` is how far its clock is wrong.
    """
    asked: list[str] = []

    class Requests(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            asked.append(f"{self.command} {self.path} {len(body)}")
            status, values = answers.get(self.path, (404, {"detail": "Not Found"}))
            if not status:
                self.close_connection = True
                return
            data = values if isinstance(values, bytes) else json.dumps(values).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = answer

        def date_time_string(self, timestamp: float | None = None) -> str:
            return super().date_time_string(int(time.time() + ahead_s))

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Requests)
    server.handle_error = lambda *_: None
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server.server_address[1], asked
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def raw_server(talk: Callable[[socket.socket], None], *, tls: ssl.SSLContext | None = None) -> Iterator[int]:
    """Serve each connection with `talk`, in a thread of its own."""
    listener = socket.create_server(("127.0.0.1", 0))

    def one(connection: socket.socket) -> None:
        with suppress(OSError), closing(connection):
            talk(tls.wrap_socket(connection, server_side=True) if tls is not None else connection)

    def accept() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=one, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.close()


def read_now(source: ssl.SSLSocket) -> bytes | None:
    """What can be read without waiting, None where it was no data (a session ticket), nothing at the end."""
    source.settimeout(0.0)
    try:
        part = source.recv(65536)
        while source.pending():
            part += source.recv(source.pending())
        return part
    except ssl.SSLWantReadError:
        return None
    finally:
        source.settimeout(20.0)


@contextmanager
def recorded(port: int, server: ssl.SSLContext, target: int, upstream: ssl.SSLContext) -> Iterator[list[bytes]]:
    """Pass everything that comes to `port` on to `target`, by TLS on both sides, and keep a copy in clear of both directions."""
    record: list[bytes] = []
    listener = socket.create_server(("127.0.0.1", port))

    def join(plain: socket.socket) -> None:
        """One thread for both directions: OpenSSL does not let two use one connection at a time."""
        with suppress(OSError), server.wrap_socket(plain, server_side=True) as near, closing(reach()) as far:
            other = {near: far, far: near}
            while True:
                for source in select.select([near, far], [], [])[0]:
                    if (part := read_now(source)) == b"":
                        return
                    if part:
                        record.append(part)
                        other[source].sendall(part)

    def reach() -> ssl.SSLSocket:
        return upstream.wrap_socket(socket.create_connection(("127.0.0.1", target)), server_hostname="localhost")

    def accept() -> None:
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=join, args=(near,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    with listener:
        yield record


def closed_port() -> int:
    """Return a port on which nobody listens."""
    return free_port()

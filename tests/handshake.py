"""A TLS handshake's first word, written by hand: no library of today offers what must be refused."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from contextlib import suppress

SSL3, TLS10, TLS11, TLS12, TLS13 = 0x0300, 0x0301, 0x0302, 0x0303, 0x0304
SUITES = [block << 8 | low for block in (0x00, 0x13, 0xC0, 0xCC, 0xD0) for low in range(256)]
"""Every block of cipher suites that the registry knows, but for the fallback signal."""
FALLBACK_SIGNAL = 0x5600


def _vector(data: bytes, width: int) -> bytes:
    return len(data).to_bytes(width, "big") + data


def _words(values: Sequence[int]) -> bytes:
    return b"".join(value.to_bytes(2, "big") for value in values)


def _extensions(version: int) -> bytes:
    groups = {10: _vector(_words([29, 23, 24]), 2), 11: b"\1\0", 13: _vector(_words([0x0403, 0x0503, 0x0804, 0x0401, 0x0203]), 2)}
    modern = {43: _vector(_words([TLS13]), 1), 51: _vector(_words([29]) + _vector(os.urandom(32), 2), 2)}
    chosen = groups | (modern if version == TLS13 else {})
    return _vector(b"".join(_words([number]) + _vector(data, 2) for number, data in chosen.items()), 2)


def hello(version: int, suites: Sequence[int], compressions: bytes = b"\0") -> bytes:
    """A ClientHello in its record; TLS 1.3 dresses as 1.2."""
    body = _words([min(version, TLS12)]) + os.urandom(32) + b"\0" + _vector(_words(suites), 2) + _vector(compressions, 1)
    body += _extensions(version) if version != SSL3 else b""
    return b"\x16" + _words([min(version, TLS10)]) + _vector(b"\1" + _vector(body, 3), 2)


def greet(port: int, version: int, suites: Sequence[int], compressions: bytes = b"\0") -> tuple[int, int] | str:
    """Cipher suite and compression that the server chose, or how it refused."""
    received = b""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as plain, suppress(ConnectionError):
        plain.sendall(hello(version, suites, compressions))
        while len(received) < 200 and (chunk := plain.recv(4096)):
            received += chunk
            if received[0] == 0x15 and len(received) >= 7:
                return f"alert {received[6]}"
    if received[:1] != b"\x16":
        return "closed"
    after_session = 44 + received[43]
    return int.from_bytes(received[after_session : after_session + 2], "big"), received[after_session + 2]

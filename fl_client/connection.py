"""The way to the coordinator, looked at step by step: name, port, TLS, Flower's Fleet API, clock, admission.

The requests go through the HTTP library that Flower uses, so an outbound proxy named in HTTPS_PROXY serves or fails both alike.
Nothing that is asked changes anything at the coordinator, and nothing of the site is sent but its public key.
"""

from __future__ import annotations

import datetime as dt
import json
import socket
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import grpc
import httpx
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fl_client import flower_private as flower
from fl_client.check import Check, attempt, within
from icmoe.errors import Fault, IcmoeError
from icmoe.joining import split_address, validity_fault

TIMEOUT_S = 5.0
DEADLINE_S = 30.0  # all requests together
LARGEST_BYTES = 4096  # of an answer that is read
MARGIN_S = 1.0  # an HTTP date is that coarse
UNKNOWN_NAME = {62, 64}  # OpenSSL: host name mismatch, IP address mismatch
EXPIRED, NOT_YET = 10, 9  # OpenSSL
ErrorT = TypeVar("ErrorT", bound=BaseException)


@dataclass(frozen=True, slots=True)
class Answer:
    """What the coordinator's port answered.

    Parameters
    ----------
    status
        HTTP status.
    values
        The JSON body; empty where it is something else.
    certificate
        Of the server.
    ahead_s
        How far this machine's clock is ahead of the server's, seconds; None where it sent no date.
    """

    status: int
    values: Mapping[str, Any]
    certificate: x509.Certificate | None
    ahead_s: float | None


def check_connection(address: str, ca: Path, key: ec.EllipticCurvePrivateKey | None) -> list[Check]:
    """Return what a look at the coordinator's address finds.

    Parameters
    ----------
    address
        host:port.
    ca
        The consortium's CA, PEM; readable.
    key
        The site's key; without it nobody asks whether it is admitted.
    """
    host, port = split_address(address)
    proxy = proxy_of(host)
    checks = check_port(*(proxy or (host, port)), via=f"outbound proxy for {address}, " if proxy else "")
    if not all(check.ok for check in checks):
        return [*checks, Check("coordinator", ok=False, note="not asked")]
    try:
        return checks + within(DEADLINE_S, lambda: _ask_everything(address, ca, key))
    except httpx.HTTPError as error:
        fault = _connection_fault(error, address)
    except TimeoutError:
        fault = Fault(number=312, where=address, what="port answers too slowly", limit=f"{DEADLINE_S:.0f} s")
    except ssl.SSLError:
        fault = Fault(number=308, where=str(ca), what="file cannot be used as a CA")
    return [*checks, Check("coordinator", ok=False, fault=fault)]


def is_refused(address: str, ca: Path, key: ec.EllipticCurvePrivateKey) -> bool:
    """Return whether the coordinator says that it does not know the key; where it says nothing, Flower tells why.

    Parameters
    ----------
    address
        host:port.
    ca
        The consortium's CA, PEM.
    key
        The site's key.
    """
    content, headers = flower.signed_request(key)
    try:
        context = ssl.create_default_context(cafile=str(ca))
        with httpx.Client(verify=context, timeout=TIMEOUT_S, base_url=f"https://{address}") as client:
            return _ask(client, "POST", flower.SIGNED, content, headers).values.get("code") == flower.NOT_ADMITTED
    except (httpx.HTTPError, OSError):  # a TLS error is an OSError
        return False


def proxy_of(host: str) -> tuple[str, int] | None:
    """Return host and port of the outbound proxy that the environment names for `host`, None where there is none."""
    found = getproxies()
    url = found.get("https") or found.get("all")
    if not url or proxy_bypass(host):
        return None
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        return (parts.hostname or "", parts.port or 80)
    except ValueError:  # not shown: it may hold a password
        todo = "Correct HTTPS_PROXY or ALL_PROXY: http://HOST:PORT."
        raise IcmoeError(Fault(number=311, where=host, what="proxy in the environment is no address", todo=todo)) from None


def check_port(host: str, port: int, *, via: str = "") -> list[Check]:
    """Return whether the name resolves and the port accepts a connection."""
    name = attempt("name", lambda: via + _resolved(host))
    return name + attempt("port", lambda: _connected(host, port)) if name[0].ok else name


def check_health(address: str) -> list[Check]:
    """Return what a gRPC health server says."""
    return attempt("health", lambda: _health(address))


def _resolved(host: str) -> str:
    try:
        found = within(TIMEOUT_S, lambda: socket.getaddrinfo(host, None, type=socket.SOCK_STREAM))
    except (OSError, UnicodeError) as error:  # TimeoutError is an OSError
        value = getattr(error, "strerror", None) or f"no answer in {TIMEOUT_S:.0f} s"
        raise IcmoeError(Fault(number=311, where=host, what="name does not resolve", value=value)) from None
    return ", ".join(sorted({str(item[4][0]) for item in found}))


def _connected(host: str, port: int) -> str:
    try:
        socket.create_connection((host, port), timeout=TIMEOUT_S).close()
    except OSError as error:
        value = error.strerror or f"no answer in {TIMEOUT_S:.0f} s"
        raise IcmoeError(Fault(number=311, where=f"{host}:{port}", what="port is closed", value=value)) from None
    return f"{host}:{port} is open"


def _ask_everything(address: str, ca: Path, key: ec.EllipticCurvePrivateKey | None) -> list[Check]:
    context = ssl.create_default_context(cafile=str(ca))
    with httpx.Client(verify=context, timeout=TIMEOUT_S, base_url=f"https://{address}") as client:
        answer = _ask(client, "POST", flower.UNSIGNED)
        checks = [_fleet(answer, address), *_server_certificate(answer, address), *_clock(answer, address)]
        if not checks[0].ok:
            return checks
        if key is not None and all(check.ok for check in checks):  # a wrong clock spoils the signature
            content, headers = flower.signed_request(key)
            checks.append(_admission(_ask(client, "POST", flower.SIGNED, content, headers), address))
        answers = {path: _answer_to(client, method, path) for method, path in flower.OTHER_APIS}
    return [*checks, _other_apis({path: answer for path, answer in answers.items() if answer is not None}, address)]


def _answer_to(client: httpx.Client, method: str, path: str) -> Answer | None:
    """Return the answer to a request that need not pass, None where a firewall cuts it off."""
    try:
        return _ask(client, method, path)
    except httpx.HTTPError:
        return None


def _ask(client: httpx.Client, method: str, path: str, content: bytes = b"", headers: Mapping[str, str] | None = None) -> Answer:
    start = time.time()
    with client.stream(method, path, content=content, headers=headers or flower.MEDIA_TYPE) as response:
        middle = (start + time.time()) / 2
        body = b""
        for chunk in response.iter_raw(LARGEST_BYTES):
            body += chunk
            if len(body) >= LARGEST_BYTES:
                break
        tls = response.extensions["network_stream"].get_extra_info("ssl_object")
        der = tls.getpeercert(True) if tls is not None else None  # noqa: FBT003  (it takes no keyword)
        certificate = x509.load_der_x509_certificate(der) if der else None
        return Answer(response.status_code, _values(body), certificate, _ahead(response.headers.get("date"), middle))


def _values(body: bytes) -> Mapping[str, Any]:
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _ahead(date: str | None, now: float) -> float | None:
    try:
        return now - parsedate_to_datetime(date or "").timestamp() - 0.5  # a date names the beginning of its second
    except (ValueError, OverflowError):
        return None


def _fleet(answer: Answer, address: str) -> Check:
    if answer.status == 401 and answer.values.get("detail") == flower.UNSIGNED_ANSWER:
        return Check("coordinator", ok=True, note=f"{address} speaks Flower's Fleet API over TLS and authenticates sites")
    if answer.status in (502, 503, 504):
        what, todo = "reverse proxy answers, the SuperLink behind it does not", "Wait, or ask the coordinator."
        return Check(
            "coordinator", ok=False, fault=Fault(number=311, where=address, what=what, value=f"HTTP {answer.status}", todo=todo)
        )
    what = "SuperLink does not authenticate sites" if answer.status == 200 else "port speaks HTTPS but not Flower's Fleet API"
    return Check("coordinator", ok=False, fault=Fault(number=312, where=address, what=what, value=f"HTTP {answer.status}"))


def _server_certificate(answer: Answer, address: str) -> list[Check]:
    if answer.certificate is None:
        return []
    start, end = answer.certificate.not_valid_before_utc, answer.certificate.not_valid_after_utc
    ok, fault = validity_fault(start, end, dt.datetime.now(tz=dt.UTC), where=address)
    return [Check("server certificate", ok=ok, fault=fault, note=f"valid until {end:%Y-%m-%d}")]


def _clock(answer: Answer, address: str) -> list[Check]:
    if answer.ahead_s is None:
        return []
    note = f"{abs(answer.ahead_s):.0f} s {'ahead of' if answer.ahead_s > 0 else 'behind'} the coordinator"
    ahead, behind = flower.AHEAD_S - MARGIN_S, flower.BEHIND_S - MARGIN_S
    if -behind <= answer.ahead_s <= ahead:
        return [Check("clock", ok=True, note=note)]
    limit = f"at most {ahead:.0f} s ahead, {behind:.0f} s behind"
    return [Check("clock", ok=False, fault=Fault(number=313, where=address, value=note, limit=limit))]


def _admission(answer: Answer, address: str) -> Check:
    code = answer.values.get("code")
    if code == flower.ADMITTED:
        return Check("admission", ok=True, note="the coordinator knows this site's key")
    if code == flower.NOT_ADMITTED:
        what = "coordinator does not know this site's key, or has revoked it"
        return Check("admission", ok=False, fault=Fault(number=314, where=address, what=what))
    what, value = "coordinator did not accept this site's signature", f"HTTP {answer.status}"
    return Check(
        "admission", ok=False, fault=Fault(number=314, where=address, what=what, value=value, todo="Look at the clock first.")
    )


def _other_apis(answers: Mapping[str, Answer], address: str) -> Check:
    # The SuperLink itself answers these with success or with an error of its own; behind the reverse proxy there is nothing.
    reached = [path for path, answer in answers.items() if answer.status < 400 or "code" in answer.values or answer.status == 401]
    if not reached:
        return Check("other APIs", ok=True, note="Control and Runtime API cannot be reached from here")
    what = "Flower's Control or Runtime API can be reached from here: anybody could submit code to all sites"
    todo = "Tell the coordinator: only /v1/fleet/ may pass the reverse proxy."
    return Check("other APIs", ok=True, fault=Fault(number=312, where=address, what=what, value=", ".join(reached), todo=todo))


def _connection_fault(error: BaseException, address: str) -> Fault:
    """Return the fault behind an error of the HTTP library."""
    if (refused := _cause(error, ssl.SSLCertVerificationError)) is not None:
        return _certificate_fault(refused, address)
    if (broken := _cause(error, ssl.SSLError)) is not None:
        return Fault(number=312, where=address, what="port does not speak TLS", value=(broken.reason or "closed").lower())
    if isinstance(error, httpx.ProxyError):
        return Fault(number=311, where=address, what="outbound proxy does not let the connection through", value=str(error)[:80])
    if isinstance(error, httpx.TimeoutException):
        return Fault(number=312, where=address, what="port accepts connections but does not answer", limit=f"{TIMEOUT_S:.0f} s")
    if isinstance(error, httpx.ProtocolError | httpx.DecodingError):
        return Fault(number=312, where=address, what="port speaks TLS but not HTTP")
    return Fault(number=312, where=address, what="port closes the connection", value=type(error).__name__)


def _certificate_fault(error: ssl.SSLCertVerificationError, address: str) -> Fault:
    if error.verify_code == EXPIRED:
        return Fault(number=309, where=address, what="server's certificate, or its CA's, has expired")
    if error.verify_code == NOT_YET:
        return Fault(number=309, where=address, what="server's certificate is not valid yet", todo="Set this machine's clock.")
    if error.verify_code in UNKNOWN_NAME:
        todo = "Write the address as the coordinator's certificate has it."
        return Fault(number=308, where=address, what="server's certificate is for another name", todo=todo)
    what = "server's certificate is not signed by the consortium's CA"
    todo = "If the hospital inspects TLS, exempt this address; otherwise compare the kit's digest with the coordinator."
    return Fault(number=308, where=address, what=what, value=error.verify_message, todo=todo)


def _cause(error: BaseException | None, kind: type[ErrorT]) -> ErrorT | None:
    while error is not None and not isinstance(error, kind):
        error = error.__cause__ or error.__context__
    return error


def _health(address: str) -> str:
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
        except grpc.RpcError as error:
            value = error.code().name.lower()
            raise IcmoeError(Fault(number=311, where=address, what="health server does not answer", value=value)) from None
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        raise IcmoeError(Fault(number=311, where=address, what="service is not healthy", value=status.lower()))
    return f"{address} is serving"

"""Who may ask for the page, and what a browser may do with it: an ASGI wrapper around the app.

A page on loopback is reached from every page in the same browser, so it answers to its own names only: a foreign name that
was made to point here (DNS rebinding) is refused. Beyond loopback a token is needed, once in the address, then as a cookie.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
from collections.abc import Iterable
from urllib.parse import parse_qsl, quote, urlencode

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fl_server.dashboard.page import refusal
from icmoe.errors import Fault

TOKEN = "token"  # noqa: S105  (the name of the parameter)
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}
_HOST = re.compile(r"(?P<name>\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._-]{1,253})(:[0-9]{1,5})?")
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


class Door:
    """Let in who asks by a right name and with the token, and put the page's rules on every answer.

    Parameters
    ----------
    app
        What is behind it.
    names
        Host names that are its own, in small letters.
    any_address
        Whether a numeric address will do as well: no name can be made to point at the page then.
    token
        What must be shown; nothing where absent.
    port
        Of the page: cookies do not tell ports apart, so that its name does.
    secure
        Whether the cookie goes over TLS only.
    """

    def __init__(
        self, app: ASGIApp, *, names: Iterable[str], any_address: bool, token: str | None, port: int, secure: bool
    ) -> None:
        self._app, self._names, self._any_address = app, frozenset(names), any_address
        self._token, self._cookie, self._secure = token, f"icmoe-page-{port}", secure

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return  # neither a start-up of its own nor a web socket

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        refused = self._refused(Request(scope))
        await (self._app if refused is None else refused)(scope, receive, guarded)

    def _refused(self, request: Request) -> Response | None:
        """Return the answer to who is not let in, None for the others."""
        hosts = request.headers.getlist("host")
        if len(hosts) != 1 or not self._is_own(hosts[0]):
            fault = Fault(number=521, value=", ".join(hosts)[:80], limit=", ".join(sorted(self._names)), did="Nothing was shown.")
            return HTMLResponse(refusal(fault), 421)
        if self._token is None:
            return None
        given = request.query_params.getlist(TOKEN)
        if given and all(map(self._is_token, given)):
            return self._with_cookie(request)
        if not given and self._is_token(request.cookies.get(self._cookie) or _bearer(request.headers)):
            return None
        return HTMLResponse(refusal(Fault(number=522, did="Nothing was shown.")), 403)

    def _is_own(self, host: str) -> bool:
        found = _HOST.fullmatch(host)
        if found is None:
            return False
        name = found["name"].strip("[]").rstrip(".").lower()
        return name in self._names or (self._any_address and _is_address(name))

    def _is_token(self, given: str) -> bool:
        return self._token is not None and hmac.compare_digest(given.encode(), self._token.encode())

    def _with_cookie(self, request: Request) -> Response:
        """Return the way to the same page without the token in its address, which histories keep."""
        rest = urlencode([(key, value) for key, value in parse_qsl(request.url.query) if key != TOKEN])
        answer = RedirectResponse(quote("/" + request.url.path.lstrip("/")) + (f"?{rest}" if rest else ""), 303)
        # Lax, not Strict: a link in a mail would otherwise lead to a refusal. Every answer here only reads.
        answer.set_cookie(self._cookie, self._token or "", httponly=True, samesite="lax", secure=self._secure, path="/")
        return answer


def _bearer(headers: Headers) -> str:
    """Return the token of a program that keeps no cookies."""
    kind, _, value = headers.get("authorization", "").partition(" ")
    return value.strip() if kind.lower() == "bearer" else ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True

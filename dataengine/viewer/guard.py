# SPDX-License-Identifier: Apache-2.0
"""Who may ask the viewer.

It is for the person who started it. A random token, printed in the address, becomes a cookie that every
request needs. Other pages of the same browser reach nothing: a cookie does not tell ports apart, but a
browser says where a request comes from, and a name that was made to point at this machine (DNS
rebinding) is refused.
"""

import ipaddress
import secrets
import socket
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; media-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class Guard:
    """Lets through what may pass, and marks every answer.

    Args:
        app: What answers those who may ask.
        token: Whoever knows it may.
        cookie: Name of the cookie that carries it; another viewer on this machine has another.
        host: Address that is listened on.
    """

    def __init__(self, app: ASGIApp, *, token: str, cookie: str, host: str) -> None:
        self._app = app
        self._token = token.encode()
        self._cookie = cookie
        self._names = {"localhost", host.lower(), socket.gethostname().lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        headers = Headers(scope=scope)
        entering = False

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                out = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    out[name] = value
                if "cache-control" not in out:
                    out["cache-control"] = "no-store"
                if entering:
                    out.append(
                        "set-cookie",
                        f"{self._cookie}={self._token.decode()}; Path=/; HttpOnly; SameSite=Strict",
                    )
            await send(message)

        refusal = self._refusal(scope, headers)
        if refusal is None:
            entering = scope["path"] == "/" and self._is_token(_token_of(scope))
            if not entering and not self._is_token(self._cookie_of(headers)):
                refusal = "Open the address that the terminal printed: it carries a token"
        if refusal is None:
            await self._app(scope, receive, marked)
        else:
            response = JSONResponse({"message": refusal, "hint": ""}, 403)
            await response(scope, receive, marked)

    def _refusal(self, scope: Scope, headers: Headers) -> str | None:
        """Returns why a request is refused whoever sends it, or None."""
        host = headers.get("host", "")
        if not self._is_own_name(host):
            return "This address is not the viewer's own"
        if scope["path"] == "/" and scope["method"] == "GET":
            return None  # a link from elsewhere may lead here
        if headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
            return "This request comes from another page"
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            return "This request comes from another page"
        return None

    def _is_own_name(self, host: str) -> bool:
        """Returns whether a Host header names this machine: a number always does, a name may lie."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name in self._names:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def _is_token(self, text: str) -> bool:
        return secrets.compare_digest(text.encode(errors="replace"), self._token)

    def _cookie_of(self, headers: Headers) -> str:
        try:
            cookies = SimpleCookie(headers.get("cookie", ""))
        except CookieError:
            return ""
        return cookies[self._cookie].value if self._cookie in cookies else ""


def _token_of(scope: Scope) -> str:
    query = parse_qs(scope["query_string"].decode("latin-1"))
    return query.get("token", [""])[0]

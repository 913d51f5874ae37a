"""Guard: what every request and response of the explorer must pass, as a plain ASGI layer around the pages.

A page of another site can make a browser send requests to loopback, and by rebinding its own name to 127.0.0.1 it can
read the answers (Jackson et al., "Protecting Browsers from DNS Rebinding Attacks", CCS 2007). So: known names in Host
only, nothing from other sites, no CORS header, no request with a body, and a policy that runs no script but our own.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
App = Callable[[Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]]

MOST_QUERY_BYTES = 32_000
"""Of the part of an address behind "?"."""

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cache-control": "no-store",
}
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def is_loopback(host: str) -> bool:
    """Whether a host to bind to is reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def allowed_hosts(host: str, names: Iterable[str] = ()) -> set[str]:
    """The names that requests may call the server by, in lower case: loopback's, the one it is bound to, and others."""
    return {name.lower().strip("[]") for name in (*LOOPBACK, host, *names)}


def host_of(header: str) -> str | None:
    """The name in a Host header without its port, in lower case; None for anything else than a name or address."""
    text = header.strip().lower()
    if text.startswith("["):
        name, closed, port = text[1:].partition("]")
        if not closed or (port and not (port[:1] == ":" and port[1:].isdecimal())):
            return None
        return name
    name, colon, port = text.partition(":")
    if (colon and not port.isdecimal()) or not name or any(c in "/@?#\\ " for c in name):
        return None
    return name


class Guard:
    """Refuses what is not a plain GET of the own pages, and adds the headers to every response.

    Args:
        app: the pages.
        hosts: as `allowed_hosts` gives.
        any_address: also any literal address: for a server bound to all of a machine's. Only names can be rebound.
    """

    def __init__(self, app: App, hosts: set[str], *, any_address: bool = False) -> None:
        self._app, self._hosts, self._any_address = app, hosts, any_address

    async def __call__(
        self, scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]
    ) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        refusal = self._refusal(scope)

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(k, v) for k, v in message.get("headers", []) if k.lower().decode("latin-1") not in HEADERS]
                added = [(k.encode(), v.encode()) for k, v in HEADERS.items()]
                message = {**message, "headers": own + added}
            await send(message)

        if refusal is None:
            await self._app(scope, receive, guarded)
            return
        status, words = refusal
        body = f"{words}\n".encode()
        headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
        if status == 405:
            headers.append((b"allow", b"GET, HEAD"))
        # What was sent and is not read would be taken for the next request.
        headers.append((b"connection", b"close"))
        await guarded({"type": "http.response.start", "status": status, "headers": headers})
        await guarded({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})

    def _refusal(self, scope: Message) -> tuple[int, str] | None:
        found: dict[str, list[str]] = {}
        for key, value in scope["headers"]:
            found.setdefault(key.decode("latin-1").lower(), []).append(value.decode("latin-1"))
        hosts = found.get("host", [])
        if len(hosts) != 1 or not self._known(host_of(hosts[0])):
            return 421, "This server does not go by that name: see --allow-host."
        # A browser says where a request began; a name typed in, or a program, sends "none" or nothing.
        if any(value in ("cross-site", "same-site") for value in found.get("sec-fetch-site", [])):
            return 403, "Requests from other sites are refused."
        if scope["method"] not in ("GET", "HEAD"):
            return 405, "Pages are read with GET."
        if "transfer-encoding" in found or any(value.strip() != "0" for value in found.get("content-length", [])):
            return 413, "A request has no body here."
        if len(scope.get("query_string", b"")) > MOST_QUERY_BYTES:
            return 414, f"The question is too long: at most {MOST_QUERY_BYTES:,} bytes as an address has them."
        return None

    def _known(self, name: str | None) -> bool:
        if name is None:
            return False
        if name in self._hosts:
            return True
        if not self._any_address:
            return False
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

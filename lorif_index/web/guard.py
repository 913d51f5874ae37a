"""Guard: what every request and response of the explorer must pass.

A page of another site can make a browser send requests to loopback, and by rebinding its own name to 127.0.0.1 it can
read the answers (Jackson et al., "Protecting Browsers from DNS Rebinding Attacks", CCS 2007). So: known names in Host
only, nothing from other sites, no CORS header, and a policy that runs no script but our own.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from urllib.parse import urlsplit

HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
        "trusted-types 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cache-control": "no-store",
}
"""Of every response."""

EVERYWHERE = ("0.0.0.0", "::")


def is_loopback(host: str) -> bool:
    """Whether a host to bind to is reached from this machine only."""
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def host_of(header: str) -> str | None:
    """The name in a Host header without its port, in lower case; None for anything else than a name or address."""
    try:
        parts = urlsplit(f"//{header}")
        plain = parts.netloc == header and "@" not in header and (parts.port is None or parts.port > 0)
    except ValueError:
        return None
    return parts.hostname if plain else None


class Guard:
    """Says which requests are refused.

    Args:
        host: what the server is bound to. Bound to all of a machine's addresses, it goes by any literal one: only names
            can be rebound.
        names: further names that it goes by.
    """

    def __init__(self, host: str, names: Iterable[str] = ()) -> None:
        known = ("localhost", "127.0.0.1", "::1", host, *names)
        self._hosts, self._any_address = {name.lower().strip("[]") for name in known}, host in EVERYWHERE

    def refusal(self, headers: Mapping[str, str]) -> tuple[int, str] | None:
        """(status, why) of a request that is not to be answered; None for the others.

        Args:
            headers: of the request; keys in any case.
        """
        name = host_of(headers.get("host", ""))
        if name is None or not (name in self._hosts or (self._any_address and _is_address(name))):
            return 421, "This server does not go by that name: see --allow-host."
        # A browser says where a request began; a name typed in, or a program, sends "none" or nothing.
        if headers.get("sec-fetch-site") in ("cross-site", "same-site"):
            return 403, "Requests from other sites are refused."
        return None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True

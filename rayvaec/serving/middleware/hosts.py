"""Host names that the endpoint answers: protection against DNS rebinding and cross-site requests.

A web page may give its own name the address 127.0.0.1; the browser then takes this endpoint's
answers for the page's own. What tells such requests apart is their Host header, which a page cannot
choose. (Starlette's TrustedHostMiddleware knows neither 127.0.0.0/8 nor trailing dots, reads the
first of several Host headers, and can let no path through.)
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from rayvaec.errors import ConfigError, RequestError
from rayvaec.serving.middleware.auth import is_loopback_address

ANY_HOST_PATHS = frozenset({"/healthz", "/readyz"})
"""Paths answered under any Host: probes of Kubernetes name the pod's address. They tell nothing."""

_AUTHORITY = re.compile(r"(\[[0-9a-f:.]+\]|[^\[\]:@/?#\\\s]+)(?::[0-9]{0,5})?", re.IGNORECASE)
_NAME = re.compile(r"(\*\.)?[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*")


class AllowedHosts:
    """Host names that requests may be sent to, each with any port.

    Parameters
    ----------
    names : iterable of str
        Host names and addresses beside those of loopback; ``*.example.org`` stands for every
        name below ``example.org``.
    has_token : bool
        Whether requests need a token. Then every host is allowed unless `names` are given.

    Raises
    ------
    ConfigError
        If one of `names` is not a host name, such as one with a port or a scheme.
    """

    def __init__(self, names: Iterable[str], has_token: bool) -> None:
        listed = [_listed(name) for name in names]
        self._names = frozenset(name for name in listed if not name.startswith("*"))
        self._suffixes = tuple(name[1:] for name in listed if name.startswith("*"))
        self._any_host, self._check_origin = has_token and not listed, not has_token

    def check(self, path: str, headers: Headers) -> None:
        """Refuse a request that was sent to another host or, without a token, by another site.

        Parameters
        ----------
        path : str
            Of the request.
        headers : Headers
            Of the request.

        Raises
        ------
        RequestError
            400 for no or several Host headers, 421 for another host, 403 for another site.
        """
        if self._any_host or path in ANY_HOST_PATHS:
            return
        hosts = headers.getlist("host")
        if len(hosts) != 1:
            raise RequestError(
                f"the request has {len(hosts)} Host headers",
                "send one, as HTTP/1.1 asks for",
                status=400,
                error="bad_host",
            )
        if not self._allows(hosts[0]):
            raise RequestError(
                f"this endpoint is not served as {hosts[0][:60]!r}",
                "use localhost or 127.0.0.1, or start the server with `--allowed-host NAME`",
                status=421,
                error="misdirected",
            )
        if self._check_origin:
            for origin in headers.getlist("origin"):
                self._check_site(origin, hosts[0])

    def _check_site(self, origin: str, host: str) -> None:
        """Refuse a page of another origin than the endpoint's own, unless its host is listed."""
        authority = origin.partition("://")[2]
        if authority.lower() != host.lower() and not self._is_listed(host_name(authority)):
            raise RequestError(
                f"a page of {origin[:60]!r} sent this request",
                "ask from the endpoint's own page or a program, or set a token",
                status=403,
                error="cross_site",
            )

    def _allows(self, host: str) -> bool:
        name = host_name(host)
        is_local = name == "localhost" or is_loopback_address(name or "")
        return is_local or self._is_listed(name)

    def _is_listed(self, name: str | None) -> bool:
        return name is not None and (name in self._names or name.endswith(self._suffixes))


def host_name(authority: str) -> str | None:
    """Return the host of ``host[:port]``: in lower case, without brackets and trailing dot.

    Parameters
    ----------
    authority : str
        Value of a Host header.

    Returns
    -------
    str or None
        None where it is not of that form.
    """
    match = _AUTHORITY.fullmatch(authority)
    return (_canonical(match[1]) or None) if match else None


def _canonical(name: str) -> str:
    """Return the one spelling of a name or an address."""
    name = name.lower().removesuffix(".").strip("[]")
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        return name


def _listed(name: str) -> str:
    """Check one of the names that a user allows; return its one spelling."""
    plain = _canonical(name.strip())
    if _NAME.fullmatch(plain) or _is_address(plain):
        return plain
    host = urlsplit(plain).hostname if "://" in plain else host_name(plain)
    advice = f"give the name alone: {host}" if host else "give a name such as draws.example.org"
    raise ConfigError(f"--allowed-host {name!r} is not a host name", advice)


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True

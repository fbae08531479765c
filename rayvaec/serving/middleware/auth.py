"""Token authentication; without a token, only this machine may connect."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import socket
from pathlib import Path

from rayvaec.errors import ConfigError

TOKEN_VARIABLE = "RAYVAEC_TOKEN"  # noqa: S105 - the variable's name, not a token
SHORTEST_TOKEN = 16
_NEW_TOKEN = "make one with: openssl rand -hex 32"  # noqa: S105


def token_digest(token_file: str | Path | None = None) -> str | None:
    """Return the SHA-256 of the endpoint's token; the token itself is not kept.

    Parameters
    ----------
    token_file : str or Path, optional
        File with the token; by default the environment variable RAYVAEC_TOKEN holds it.

    Returns
    -------
    str or None
        64 hexadecimal digits; None where no token is set.

    Raises
    ------
    ConfigError
        If the file cannot be read, or the token is too short or not plain ASCII.
    """
    if token_file is None:
        token, where = os.environ.get(TOKEN_VARIABLE), TOKEN_VARIABLE
        if token is None:
            return None
    else:
        token, where = _read(Path(token_file)), f"the token file {token_file}"
    token = token.strip()
    if len(token) < SHORTEST_TOKEN:
        raise ConfigError(
            f"{where} holds {len(token)} characters, a token needs {SHORTEST_TOKEN} or more",
            _NEW_TOKEN,
        )
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise ConfigError(f"{where} holds spaces or other than plain characters", _NEW_TOKEN)
    return digest(token)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ConfigError(
            f"cannot read the token file {path} ({error.strerror})", _NEW_TOKEN
        ) from error


def digest(token: str) -> str:
    """Return the SHA-256 of a token as 64 hexadecimal digits."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


def authorized(header: str | None, expected_digest: str) -> bool:
    """Compare a request's token with the endpoint's, in a time that tells nothing about it.

    Parameters
    ----------
    header : str or None
        Value of the Authorization header.
    expected_digest : str
        From `token_digest`.

    Returns
    -------
    bool
    """
    scheme, _, token = (header or "").partition(" ")
    same = hmac.compare_digest(digest(token.strip()), expected_digest)
    return same and scheme.lower() == "bearer"


def is_loopback(host: str) -> bool:
    """Return whether a host name or address can only be reached from this machine.

    Parameters
    ----------
    host : str
        Such as ``"127.0.0.1"``, ``"localhost"`` or ``"0.0.0.0"``.

    Returns
    -------
    bool
        False as well for a name that cannot be resolved.
    """
    try:
        return _is_loopback(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        found = socket.getaddrinfo(host, None)
    except OSError:
        return False
    return all(is_loopback_address(str(entry[4][0])) for entry in found)


def is_loopback_address(text: str) -> bool:
    """Return whether a text is an IP address that can only be reached from this machine.

    Parameters
    ----------
    text : str
        Such as ``"127.0.0.1"``, ``"::1"`` or ``"::ffff:127.0.0.1"``.

    Returns
    -------
    bool
        False for names.
    """
    try:
        return _is_loopback(ipaddress.ip_address(text))
    except ValueError:
        return False


def _is_loopback(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped.is_loopback
    return address.is_loopback


def arrived_on_loopback(server: tuple[str, int | None] | None) -> bool:
    """Return whether a connection was made to an address of this machine alone.

    Parameters
    ----------
    server : tuple of str and int, or None
        ASGI's ``scope["server"]``: the local end of the connection.

    Returns
    -------
    bool
        False where that is not known.
    """
    return server is not None and is_loopback_address(server[0])


def check_bind(host: str, has_token: bool) -> None:
    """Refuse to listen beyond this machine without a token.

    Parameters
    ----------
    host : str
        Address to bind.
    has_token : bool
        Whether requests need a token.

    Raises
    ------
    ConfigError
        If others could reach the endpoint and no token is set.
    """
    if not has_token and not is_loopback(host):
        raise ConfigError(
            f"--host {host} can be reached from other machines and no token is set",
            f"set {TOKEN_VARIABLE} or pass --token-file FILE ({_NEW_TOKEN})",
        )

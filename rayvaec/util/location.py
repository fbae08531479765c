"""Locations: local paths and URLs.

`pathlib.Path` makes ``s3:/bucket`` of ``s3://bucket``, so a place that may be a URL is a `Location`
from the moment it enters, and its text when it goes to another process.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from rayvaec.errors import ConfigError

SCHEMES = ("s3", "gs", "https", "http")


@dataclass(frozen=True)
class Url:
    """The address of a folder, without anything secret in it.

    Parameters
    ----------
    scheme : {"s3", "gs", "https", "http"}
        How it is reached.
    host : str
        The bucket, or the server with its port.
    path : str
        The rest, without a slash at either end; may be empty.
    """

    scheme: str
    host: str
    path: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.host}/{self.path}".rstrip("/")

    def __truediv__(self, name: str) -> Url:
        return Url(self.scheme, self.host, f"{self.path}/{name}".lstrip("/"))


Location = Path | Url


def location(where: str | Path | Url) -> Location:
    """Tell paths from URLs.

    Parameters
    ----------
    where : str, Path or Url
        What a user gave. A Path that was made of a URL is mended.

    Returns
    -------
    Path or Url

    Raises
    ------
    ConfigError
        If it is a URL of another kind, without a bucket or host, or with a password or a query,
        which would end up in logs and run folders.
    """
    if isinstance(where, Url):
        return where
    text = str(where)
    slashes = "/" if isinstance(where, Path) else "//"
    found = re.match(rf"([A-Za-z0-9+.-]{{2,}}):{slashes}", text)
    if found is None:
        return Path(where)
    scheme, rest = found[1].lower(), text[found.end() :]
    # From here on a message shows the host alone: the rest may hold a password.
    host, _, path = rest.partition("/")
    host = host.rpartition("@")[2]
    if scheme not in SCHEMES:
        raise ConfigError(
            f"{scheme}://{host} is no kind of URL that is read", f"use one of {_kinds()}, or a path"
        )
    parts = urlsplit(f"{scheme}://{rest}")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ConfigError(
            f"the URL at {scheme}://{host.partition('?')[0]} holds a user, a password or a query",
            "leave them out: credentials are read from the environment",
        )
    if not host:
        raise ConfigError(f"the URL {scheme}:// names no bucket or host", f"use {_kinds()}")
    return Url(scheme, host, path.strip("/"))


def _kinds() -> str:
    return ", ".join(f"{scheme}://" for scheme in SCHEMES)

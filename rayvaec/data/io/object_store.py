"""Read files from object stores and web servers through obstore, with retries.

Nothing is listed: a web server has no listing, and a bucket's costs time. obstore repeats a request
that met a full or failing server or a broken connection; an answer that breaks off halfway is
asked for again here where obstore cannot go on with it. Messages are put together here from the
kind of an error: those of obstore repeat what the server said, a key's id and signature included.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from rayvaec.data.io.byte_reader import ByteRange, ByteReader, LocalByteReader
from rayvaec.errors import ConfigError, StoreError
from rayvaec.util.location import Location, Url

if TYPE_CHECKING:
    import zarr

CONNECTIONS = 16
"""Files that are asked for at the same time."""
COALESCE_BYTES = 128 * 1024
"""A gap this small is read along: it takes less time than another request."""
PIECE_BYTES = 8 * 2**20
"""What is asked for at once of a large file."""
ATTEMPTS = 5
"""How often an answer may break off."""
MAX_RETRIES = 8
TIMEOUT_S, CONNECT_TIMEOUT_S, RETRY_TIMEOUT_S = 60, 10, 90


class ObjectStoreReader:
    """Files below a URL; safe to use from several threads.

    Parameters
    ----------
    url : Url
        The folder.

    Raises
    ------
    ConfigError
        If obstore is not installed, or the environment configures it wrongly.
    """

    is_local = False

    def __init__(self, url: Url) -> None:
        self._url = url
        self._client = _client(url)
        self._fetched = threading.local()

    def locate(self, key: str) -> str:
        """Return the full address of a file, for messages."""
        return str(self._url / key)

    def text(self, key: str) -> str | None:
        """Return a small file's text, None where there is no such file."""
        content = self.whole(key)
        return None if content is None else content.decode("utf-8", errors="replace")

    def whole(self, key: str) -> bytes | None:
        """Return a small file's bytes, None where there is no such file."""
        import obstore

        try:
            return bytes(self._ask(key, lambda: obstore.get(self._client, key).bytes()))
        except FileNotFoundError:
            return None

    def size(self, key: str) -> int | None:
        """Return a file's size in bytes, None where there is no such file."""
        import obstore

        try:
            return int(self._ask(key, lambda: obstore.head(self._client, key)["size"]))
        except FileNotFoundError:
            return None

    def read(self, key: str, start: int, out: NDArray[np.uint8]) -> None:
        """Fill `out` with the bytes of a file, from `start` on; see `ByteReader.read`."""
        stop = start + len(out)
        for begin, content in getattr(self._fetched, "ranges", {}).get(key, ()):
            if begin <= start and stop <= begin + len(content):
                out[:] = content[start - begin : stop - begin]
                return
        for begin, content in self._pieces(key, start, stop):
            out[begin - start : begin - start + len(content)] = content

    def fetch(self, ranges: Iterable[ByteRange]) -> None:
        """Read many ranges at once; this thread's next reads find them in memory."""
        by_key: dict[str, set[tuple[int, int]]] = {}
        for key, start, stop in ranges:
            if stop > start:
                by_key.setdefault(key, set()).add((start, stop))
        self._fetched.ranges = {}
        wanted = {key: sorted(parts) for key, parts in by_key.items()}
        if len(wanted) == 1:
            ((key, parts),) = wanted.items()
            self._fetched.ranges = {key: self._parts(key, parts)}
        elif wanted:
            found = self._threads.map(self._parts, wanted.keys(), wanted.values())
            self._fetched.ranges = dict(zip(wanted, found, strict=True))

    def checksum(self, key: str) -> str | None:
        """Return ``sha256:`` and a file's SHA-256, None where there is no such file."""
        size = self.size(key)
        if size is None:
            return None
        digest = hashlib.sha256()
        for _, content in self._pieces(key, 0, size):
            digest.update(content.data)
        return f"sha256:{digest.hexdigest()}"

    def zarr_store(self) -> Any:
        """Return what zarr opens these files by."""
        from rayvaec.data.io.zarr_store import ByteReaderStore

        return ByteReaderStore(self)

    def zarr_array(self, path: str) -> zarr.Array[Any]:
        """Open an array with zarr itself."""
        import zarr

        # Said, so that zarr does not look for the other version: S3 answers 403 where a file is
        # missing and the user may not list.
        version: Literal[2, 3] = 2 if self.whole(f"{path}/zarr.json") is None else 3
        return zarr.open_array(self.zarr_store(), path=path, mode="r", zarr_format=version)

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="rayvaec-fetch")

    def _pieces(self, key: str, start: int, stop: int) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """Read a range, a large one in pieces, four of them at a time."""
        pieces = list(pairwise([*range(start, stop, PIECE_BYTES), stop]))
        if len(pieces) == 1:
            yield from self._parts(key, pieces)
            return
        for at in range(0, len(pieces), 4):
            asked = [self._threads.submit(self._parts, key, [p]) for p in pieces[at : at + 4]]
            for answer in asked:
                yield from answer.result()

    def _parts(self, key: str, parts: list[tuple[int, int]]) -> list[tuple[int, NDArray[np.uint8]]]:
        """Read ranges of one file; return where each starts, and its bytes."""
        import obstore

        starts, stops = [start for start, _ in parts], [stop for _, stop in parts]
        try:
            contents = self._ask(
                key,
                lambda: obstore.get_ranges(
                    self._client, key, starts=starts, ends=stops, coalesce=COALESCE_BYTES
                ),
            )
        except FileNotFoundError as error:
            raise self._missing(key, str(error)) from None
        found = [(s, np.frombuffer(c, np.uint8)) for s, c in zip(starts, contents, strict=True)]
        for (start, stop), (_, content) in zip(parts, found, strict=True):
            if len(content) < stop - start:
                raise self._short(key, start + len(content), stop)
        return found

    def _ask(self, key: str, request: Callable[[], Any]) -> Any:
        """Make a request, again where the answer broke off; say what is wrong where it is."""
        from obstore.exceptions import BaseError

        for attempt in range(ATTEMPTS):
            try:
                return request()
            except FileNotFoundError as error:
                if "NoSuchBucket" in str(error):
                    raise self._missing(key, str(error)) from None
                raise
            except BaseError as error:
                if attempt + 1 == ATTEMPTS or "response body error" not in str(error):
                    raise self._refusal(key, error) from None
                time.sleep(0.1 * 2**attempt)
        raise AssertionError("unreachable")

    def _missing(self, key: str, said: str) -> StoreError:
        if "NoSuchBucket" in said:
            return StoreError(
                f"there is no bucket {self._url.host} (asked for {self.locate(key)})",
                "correct the URL; AWS_ENDPOINT_URL says where to ask if it is not AWS",
            )
        return StoreError(f"the file {self.locate(key)} is missing", "copy the store again")

    def _short(self, key: str, end: int, needed: int) -> StoreError:
        return StoreError(
            f"the file {self.locate(key)} is cut short: it ends at byte {end} and {needed} are "
            "needed",
            "copy it again, or write the store again with `rayvaec prepare ... --overwrite`",
        )

    def _refusal(self, key: str, error: Exception) -> StoreError:
        """Say in our words why a file cannot be read."""
        from obstore.exceptions import (
            NotSupportedError,
            PermissionDeniedError,
            UnauthenticatedError,
        )

        said, where = str(error), self.locate(key)
        status = re.search(r"status code: (\d{3})", said)
        code = re.search(r"<Code>(\w+)</Code>", said)
        answer = " ".join([*([status[1]] if status else []), *([code[1]] if code else [])])
        if isinstance(error, PermissionDeniedError | UnauthenticatedError):
            return StoreError(
                f"access to {where} is denied ({answer})", _CREDENTIALS[self._url.scheme]
            )
        if "169.254." in said or "metadata.google" in said:
            return StoreError(
                f"there are no credentials for {where}", _CREDENTIALS[self._url.scheme]
            )
        if status and status[1] == "416":
            size = self.size(key)
            return self._short(key, size or 0, (size or 0) + 1)
        if isinstance(error, NotSupportedError):
            return StoreError(
                f"the server of {where} does not answer requests for a part of a file",
                "use one that knows HTTP ranges, such as nginx, or an object store",
            )
        if answer:
            return StoreError(f"{where} cannot be read: the server answers {answer}", _LATER)
        return StoreError(f"{where} cannot be read: {_network_problem(said)}", _LATER)


def open_reader(where: Location) -> ByteReader:
    """Return access to the files of a folder or below a URL.

    Parameters
    ----------
    where : Path or Url
        The folder; it need not exist.

    Returns
    -------
    ByteReader

    Raises
    ------
    ConfigError
        If it is a URL and obstore is not installed, or configured wrongly.
    """
    if isinstance(where, Url):
        return ObjectStoreReader(where)
    return LocalByteReader(where)


_LATER = "check the URL and the network, and try again"
_PUBLIC = "make it readable without a login, or read it as s3:// or gs://"
_CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_REGION for a user who may read it, "
    "or AWS_SKIP_SIGNATURE=true for a public bucket",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS for a user who may read it",
    "http": _PUBLIC,
    "https": _PUBLIC,
}


def _network_problem(said: str) -> str:
    """Return in a few words what a network error is about."""
    for sign, problem in (
        ("TimedOut", "the server does not answer in time"),
        ("dns error", "there is no server of that name"),
        ("Connect", "no connection to the server can be made"),
        ("BadScheme", "plain http:// is not allowed here"),
        ("body error", f"the answer broke off, {ATTEMPTS} times"),
    ):
        if sign in said:
            return problem
    return "the connection broke"


def _client(url: Url) -> Any:
    """Return obstore's client for the folder at a URL."""
    try:
        from obstore.exceptions import BaseError
        from obstore.store import GCSStore, HTTPStore, S3Store
    except ImportError as error:
        raise ConfigError(
            f"{url} is read through obstore, which is not installed",
            'pip install "rayvaec[remote]"',
        ) from error
    retries: Any = {
        "max_retries": MAX_RETRIES,
        "retry_timeout": timedelta(seconds=RETRY_TIMEOUT_S),
        "backoff": {
            "init_backoff": timedelta(milliseconds=100),
            "max_backoff": timedelta(seconds=5),
            "base": 2,
        },
    }
    client: Any = {
        "timeout": timedelta(seconds=TIMEOUT_S),
        "connect_timeout": timedelta(seconds=CONNECT_TIMEOUT_S),
        # Plain http sends data and signatures for all to read: only where asked for in so many
        # words.
        "allow_http": url.scheme == "http" or _endpoint(url).startswith("http://"),
    }
    options: Any = {"client_options": client, "retry_config": retries}
    try:
        if url.scheme == "s3":
            return S3Store(url.host, prefix=url.path or None, **options)
        if url.scheme == "gs":
            return GCSStore(url.host, prefix=url.path or None, **options)
        return HTTPStore(str(url), **options)
    except (BaseError, ValueError) as error:
        raise ConfigError(
            f"{url} cannot be opened with the configuration in the environment "
            f"({type(error).__name__})",
            _CREDENTIALS[url.scheme],
        ) from None


def _endpoint(url: Url) -> str:
    """Return the server that the environment names for this kind of URL."""
    if url.scheme == "s3":
        for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"):
            endpoint = os.environ.get(name)
            if endpoint is not None and not endpoint.startswith(("http://", "https://")):
                raise ConfigError(
                    f"{name} does not start with http:// or https://",
                    "give the server's whole URL, or unset it",
                )
            if endpoint:
                return endpoint
        return ""
    # The emulators of Google's storage are named in the key itself.
    key = os.environ.get("GOOGLE_SERVICE_ACCOUNT_KEY", "") if url.scheme == "gs" else ""
    found = re.search(r'"gcs_base_url"\s*:\s*"(http://[^"]*)"', key)
    return found[1] if found else ""

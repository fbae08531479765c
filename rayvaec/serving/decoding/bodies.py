"""Request bodies of any media type to parameters and raw cells."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rayvaec.data.registry import Registry
from rayvaec.errors import PayloadTooLargeError, UndecodableError, UnprocessableError
from rayvaec.protocol import ARROW, H5AD
from rayvaec.serving.decoding.h5ad.reader import Columns, looks_like_hdf5
from rayvaec.serving.decoding.h5ad.sandbox import Sandbox
from rayvaec.serving.decoding.parsing import Body
from rayvaec.serving.middleware.limits import Limits

_GZIP = 31
"""zlib's name for its largest window and a gzip header."""


@dataclass(frozen=True)
class Sent:
    """A request as it came.

    Parameters
    ----------
    data : bytes
        The body.
    kind : str
        Its media type.
    gzipped : bool
        Whether it is compressed.
    query : sequence of (name, value)
        Query parameters, for bodies that have no place for parameters.
    answer : str
        Media type of the answer.
    """

    data: bytes
    kind: str
    gzipped: bool
    query: Sequence[tuple[str, str]]
    answer: str


def unpack(sent: Sent, registry: Registry, limits: Limits, sandbox: Sandbox) -> Body:
    """Decompress a body, and turn an h5ad file into an Arrow stream.

    Parameters
    ----------
    sent : Sent
        The request.
    registry : Registry
        The model's names, for the columns that are read by default.
    limits : Limits
        The bounds.
    sandbox : Sandbox
        What reads h5ad files.

    Returns
    -------
    Body

    Raises
    ------
    RequestError
        400, 413 or 422, with the value, its place and what to do.
    """
    data = _gunzip(sent.data, limits.body_bytes(sent.kind)) if sent.gzipped else sent.data
    if sent.kind != H5AD:
        if sent.query:
            raise UnprocessableError(
                f"the query parameter {sent.query[0][0][:60]!r} is not understood",
                "give parameters in the body; only h5ad bodies have theirs in the address",
            )
        return Body(data, sent.kind, sent.answer)
    parameters = query_parameters(sent.query)
    if not looks_like_hdf5(data):
        raise UndecodableError(
            "the body does not begin as an HDF5 file does",
            "send an h5ad file as it is",
        )
    columns = Columns(
        labels_key=str(parameters.pop("labels_key", registry.labels_key)),
        batch_key=registry.batch_key and str(parameters.pop("batch_key", registry.batch_key)),
        layer=parameters.pop("layer", None),
    )
    return Body(sandbox.read(data, columns, parameters), ARROW, sent.answer)


def _gunzip(data: bytes, max_bytes: int) -> bytes:
    """Decompress a gzip stream, at most one byte more than may be."""
    stream = zlib.decompressobj(_GZIP)
    try:
        unpacked = stream.decompress(data, max_bytes + 1)
    except zlib.error as error:
        raise _not_gzip(f"is not a gzip stream ({error})") from error
    if len(unpacked) > max_bytes:
        raise PayloadTooLargeError(
            f"the body takes more than {max_bytes:,} bytes decompressed",
            "send fewer cells a request",
            error="body_too_large",
        )
    if not stream.eof:
        raise _not_gzip("is a gzip stream that breaks off")
    if stream.unused_data:
        raise _not_gzip("goes on after the end of its gzip stream")
    return unpacked


def _not_gzip(problem: str) -> UndecodableError:
    return UndecodableError(
        f"Content-Encoding is gzip, and the body {problem}",
        "compress the whole body once, or send it as it is",
    )


def query_parameters(query: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Read the parameters of an h5ad request from its address.

    Parameters
    ----------
    query : sequence of (name, value)
        Lists are written by repeating their name.

    Returns
    -------
    dict
        As the parameters of an Arrow stream, not yet validated.

    Raises
    ------
    UnprocessableError
        If what is not a list is given twice.
    """
    parameters: dict[str, Any] = {}
    for name, text in query:
        value = _READ.get(name, str)(text)
        if name in _LISTS:
            parameters.setdefault(name, []).append(value)
        elif name in parameters:
            raise UnprocessableError(
                f"the query parameter {name!r} is given twice",
                "give it once",
            )
        else:
            parameters[name] = value
    if "genes" in parameters:
        raise UnprocessableError(
            "unknown query parameter 'genes'",
            "an h5ad file names its genes in var",
        )
    return parameters


def _whole(text: str) -> int | str:
    return int(text) if re.fullmatch(r"-?[0-9]{1,30}", text) else text


def _number(text: str) -> float | str:
    return (
        float(text) if re.fullmatch(r"[0-9]{1,30}(\.[0-9]{0,30})?(e-?[0-9]{1,3})?", text) else text
    )


def _truth(text: str) -> bool | str:
    return {"true": True, "false": False}.get(text, text)


# What cannot be read stays as it is, for the request's schema to name.
_READ: dict[str, Callable[[str], Any]] = {
    "n_samples": _whole,
    "seed": _whole,
    "quantiles": _number,
    "allow_missing": _truth,
}
_LISTS = frozenset({"reduce", "quantiles", "out_genes"})

"""Content negotiation: media types of requests and responses."""

from __future__ import annotations

from collections.abc import Sequence

from rayvaec.errors import NotAcceptableError, UnsupportedMediaTypeError
from rayvaec.protocol import ARROW, H5AD, JSON

_UPLOADS_ARE_OFF = (
    ", as rayvaec.client does with an AnnData; h5ad uploads are off unless the server is started "
    "with `--enable-h5ad-uploads`"
)


def content_type(header: str | None, understood: Sequence[str], h5ad_uploads: bool = True) -> str:
    """Return the media type of a request's body.

    Parameters
    ----------
    header : str or None
        Value of Content-Type.
    understood : sequence of str
        Those that the route takes.
    h5ad_uploads : bool
        Whether any route takes h5ad files.

    Returns
    -------
    str

    Raises
    ------
    UnsupportedMediaTypeError
        For any other.
    """
    kind = (header or "").partition(";")[0].strip().lower()
    if kind not in understood:
        raise UnsupportedMediaTypeError(
            f"Content-Type {kind[:60]!r} is not understood",
            f"send {' or '.join(understood)}"
            + ("" if h5ad_uploads or kind != H5AD else _UPLOADS_ARE_OFF),
        )
    return kind


def is_gzipped(header: str | None) -> bool:
    """Return whether a request's body is compressed.

    Parameters
    ----------
    header : str or None
        Value of Content-Encoding.

    Returns
    -------
    bool

    Raises
    ------
    UnsupportedMediaTypeError
        For a compression other than gzip.
    """
    encoding = (header or "identity").strip().lower()
    if encoding not in ("identity", "gzip"):
        raise UnsupportedMediaTypeError(
            f"Content-Encoding {encoding[:60]!r} is not understood",
            "send the body as it is or with gzip; Arrow streams may compress their buffers",
        )
    return encoding == "gzip"


def accepted(header: str | None) -> str:
    """Return the media type of the answer: the one that Accept weighs most, JSON in doubt.

    Parameters
    ----------
    header : str or None
        Value of Accept.

    Returns
    -------
    str

    Raises
    ------
    NotAcceptableError
        If none that can be given is accepted.
    """
    header = header or "*/*"
    best, best_weight = "", 0.0
    for entry in header.split(","):
        kind, *parameters = (part.strip().lower() for part in entry.split(";"))
        weight = _weight(parameters)
        if kind in ("*/*", "application/*"):
            kind = JSON
        if kind in (JSON, ARROW, H5AD) and weight > best_weight:
            best, best_weight = kind, weight
    if not best:
        raise NotAcceptableError(
            f"Accept {header[:60]!r} names nothing that can be given",
            f"accept {JSON}, {ARROW} or {H5AD}",
        )
    return best


def _weight(parameters: Sequence[str]) -> float:
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            try:
                return float(value)
            except ValueError:
                return 0.0
    return 1.0

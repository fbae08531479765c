"""Error responses, and which of them are worth a retry."""

from __future__ import annotations

import json
import time
from email.utils import parsedate_to_datetime

from rayvaec.client.transport import Reply
from rayvaec.errors import RequestError


class RetryableError(Exception):
    """A failure that may not be one the next time.

    Parameters
    ----------
    failure : RequestError
        What to raise if it is.
    wait : float
        Seconds that the server asks to wait.
    """

    def __init__(self, failure: RequestError, wait: float = 0.0) -> None:
        super().__init__(failure, wait)
        self.failure, self.wait = failure, wait


async def check(reply: Reply) -> Reply:
    """Raise the server's refusal, if the answer is one.

    Parameters
    ----------
    reply : Reply
        An answer that has begun.

    Returns
    -------
    Reply
        The same, where it is no refusal.

    Raises
    ------
    RequestError
        With the server's words.
    RetryableError
        If the request may be let in later.
    """
    if reply.status < 400:
        return reply
    said = _said(await reply.whole())
    failure = RequestError(
        said.get("detail") or f"the server answers {reply.status} {reply.reason}",
        said.get("fix", ""),
        status=reply.status,
        error=said.get("error", "refused"),
        request_id=said.get("request_id") or reply.headers.get("X-Request-ID", ""),
    )
    # A 5xx without the endpoint's own body comes from the proxy before it: its replica is gone.
    if reply.status in (429, 503) or (reply.status >= 500 and not said):
        raise RetryableError(failure, _retry_after(reply.headers.get("Retry-After", "")))
    raise failure


def _said(body: bytes) -> dict[str, str]:
    try:
        said = json.loads(body)
    except ValueError:
        return {}
    return said if isinstance(said, dict) and "detail" in said else {}


def _retry_after(header: str) -> float:
    """Return the seconds that Retry-After names, as a number or as a date."""
    try:
        return max(float(header), 0.0)
    except ValueError:
        pass
    try:
        return max(parsedate_to_datetime(header).timestamp() - time.time(), 0.0)
    except ValueError:
        return 0.0

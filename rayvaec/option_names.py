"""What messages call an option: a flag on the command line, an argument in Python.

Messages are written with flags: "choose another --out or --overwrite", "give --genes=FILE". The
command `rayvaec` shows them as they are; whoever called from Python reads of `out`,
`overwrite=True` and `genes=FILE`. What is between backquotes already is a command and stays one.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

SWITCHES = frozenset(
    {
        *("append", "batch-correction", "by-label", "drop-empty", "enable-h5ad-uploads"),
        *("keep-prior", "new-labels", "overwrite", "resume", "use-gpu", "verify"),
    }
)
"""Flags that take no value."""
ARGUMENTS = {"allowed-host": "allowed_hosts"}
"""Arguments that are not called as their flags are."""

_MENTION = re.compile(
    r"`[^`]*`"
    r"|(?<![\w-])--set (?P<setting>\w+=[^\s,;)]+)"
    r"|(?<![\w-])--(?P<flag>[a-z][a-z0-9-]*[a-z0-9])"
    r"(?:=(?P<value>'[^']*'|[^\s,;)]+)| (?P<word>[A-Z\d][^\s,;)]*))?"
)
_with_flags = False


@contextmanager
def flags_in_messages() -> Iterator[None]:
    """Leave flags in the messages of this process meanwhile: its user typed a command."""
    global _with_flags
    before, _with_flags = _with_flags, True
    try:
        yield
    finally:
        _with_flags = before


def addressed(text: str) -> str:
    """Return a message with options named as its reader gives them.

    Parameters
    ----------
    text : str
        With flags; between a flag and its value stands a ``=``, or a blank before a number or a
        word in capitals.
    """
    return text if _with_flags else _MENTION.sub(_in_python, text)


def _in_python(mention: re.Match[str]) -> str:
    flag, setting, value = mention["flag"], mention["setting"], mention["value"] or mention["word"]
    if setting:
        return f"`{setting}`"
    if flag is None:
        return mention[0]
    name = ARGUMENTS.get(flag, flag.replace("-", "_"))
    if flag in SWITCHES:
        return f"`{name}=True`" + mention[0].removeprefix(f"--{flag}")
    if value is None:
        return f"`{name}`"
    return f"`{name}={value!r}`" if re.fullmatch(r"[a-z_]\w*", value) else f"`{name}={value}`"


def _address(record: logging.LogRecord) -> bool:
    if isinstance(record.msg, str):
        record.msg = addressed(record.msg)
    return True


logging.getLogger("rayvaec").addFilter(_address)

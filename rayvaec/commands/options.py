"""What the verbs share: the type of the parser they join, and options that several have."""

from __future__ import annotations

import argparse
from pathlib import Path

Verbs = argparse._SubParsersAction


def add_out(verb: argparse.ArgumentParser, metavar: str, help_text: str) -> None:
    """Add ``--out`` and ``--overwrite``.

    Parameters
    ----------
    verb : ArgumentParser
        The verb's parser.
    metavar, help_text : str
        Of ``--out``.
    """
    verb.add_argument("--out", type=Path, required=True, metavar=metavar, help=help_text)
    verb.add_argument("--overwrite", action="store_true", help="replace what stands there")

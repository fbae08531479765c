"""Command-line options that several commands share."""

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


def add_layer(verb: argparse.ArgumentParser) -> None:
    """Add ``--layer``, for verbs that read stores which rayvaec did not write."""
    verb.add_argument(
        "--layer",
        help="layer with the counts, or raw, of an AnnData Zarr or a collection (default: X)",
    )


def with_layer(store: str, layer: str | None) -> str:
    """Return a store's name with the layer to read, as `rayvaec.data.open_store` takes it."""
    return store if layer is None else f"{store}::{layer}"

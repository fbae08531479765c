"""Names of served models and their locations."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from rayvaec.errors import ConfigError

ONLY_NAME = "model"
"""Name of a model that is served alone and was given none."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def check_names(models: Mapping[str, object]) -> None:
    """Refuse names that cannot stand in an address.

    Parameters
    ----------
    models : mapping
        By name.

    Raises
    ------
    ConfigError
        If there are none, or one is not of letters, digits, ``_``, ``-`` and ``.``.
    """
    if not models:
        raise ConfigError("there is no model to serve", "name one: rayvaec serve MODEL")
    for name in models:
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"{name!r} cannot be the name of a model",
                "use up to 64 letters, digits, '_', '-' and '.', the first a letter or digit",
            )


def named_models(words: Sequence[str]) -> dict[str, Path]:
    """Read the models of a command line: ``MODEL``, or ``NAME=MODEL`` once or more.

    Parameters
    ----------
    words : sequence of str
        As they were given.

    Returns
    -------
    dict
        Folder of each model by its name, in the order given.

    Raises
    ------
    ConfigError
        If one of several has no name, a name is given twice, or is none.
    """
    models: dict[str, Path] = {}
    for word in words:
        name, equals, folder = word.partition("=")
        if not equals or Path(word).exists():
            name, folder = ONLY_NAME, word
            if len(words) > 1:
                raise ConfigError(
                    f"{word} has no name, and {len(words)} models are to be served",
                    f"name each: rayvaec serve NAME={word} ...",
                )
        if name in models:
            raise ConfigError(f"two models are named {name!r}", "give each a name of its own")
        models[name] = Path(folder)
    check_names(models)
    return models

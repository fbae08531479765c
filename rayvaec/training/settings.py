"""Settings as dataclass fields with range and help, parsed from text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field, fields
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from rayvaec.errors import ConfigError


def setting(
    default: Any,
    about: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    choices: tuple[str, ...] = (),
    resumable: bool = False,
) -> Any:
    """Declare a setting: default, one line about it, and its range.

    Parameters
    ----------
    default : Any
        Value where none is given.
    about : str
        One line for help texts.
    low, high, above : float, optional
        Smallest value, largest value, value that must be exceeded.
    choices : tuple of str
        Allowed words.
    resumable : bool
        Whether a run may be resumed with another value.

    Returns
    -------
    dataclasses.Field
    """
    limits = {"low": low, "high": high, "above": above, "choices": choices}
    return field(default=default, metadata={"about": about, "resumable": resumable, **limits})


def find_problems(cls: type, values: Mapping[str, Any]) -> list[str]:
    """Return which values of a complete set have a wrong type or are out of range.

    Parameters
    ----------
    cls : type
        A dataclass whose fields are declared with `setting`.
    values : Mapping
        A value for every field.

    Returns
    -------
    list of str
        One text a problem.
    """
    problems = []
    for item in fields(cls):
        value, hint = values[item.name], _hints(cls)[item.name]
        if not _has_type(value, hint):
            problems.append(f"{item.name}={value!r} is not {_type_name(hint)}")
        elif value is not None:
            problems += _out_of_range(item.name, value, item.metadata)
    return problems


def read_values(
    cls: type, values: Mapping[str, Any], elsewhere: Mapping[str, str]
) -> tuple[dict[str, Any], list[str]]:
    """Turn texts into the types that the settings have.

    Parameters
    ----------
    cls : type
        A dataclass whose fields are declared with `setting`.
    values : Mapping
        Settings by name, as texts or as values.
    elsewhere : Mapping
        Names that other programs have for settings, and what to give here instead.

    Returns
    -------
    read : dict
        The values that could be read.
    problems : list of str
        The others: unknown names, values of another type.
    """
    read, problems = {}, []
    hints = _hints(cls)
    for name, value in values.items():
        if name not in hints:
            instead = elsewhere.get(name)
            problems.append(
                f"unknown setting {name!r}: {instead}"
                if instead
                else unknown("setting", name, hints)
            )
            continue
        parsed = _parse(value, hints[name])
        if _has_type(parsed, hints[name]):
            read[name] = parsed
        else:
            problems.append(f"{name}={value!r} is not {_type_name(hints[name])}")
    return read, problems


def read_pairs(texts: Sequence[str], flags: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Merge ``key=value`` texts and flags; a key with two values is a problem.

    Parameters
    ----------
    texts : sequence of str
        ``key=value`` each.
    flags : Mapping
        Settings by name; None means not given.

    Returns
    -------
    values : dict
        Settings by name.
    problems : list of str
        What could not be read.
    """
    pairs = [(name, value) for name, value in flags.items() if value is not None]
    problems = []
    for text in texts:
        name, equals, value = text.partition("=")
        if equals and name.strip():
            pairs.append((name.strip(), value.strip()))
        else:
            problems.append(f"setting {text!r} is not of the form key=value")
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values and str(values[name]) != str(value):
            problems.append(f"{name} is given twice, as {values[name]} and as {value}")
        values[name] = value
    return values, problems


def read_file(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Read settings by name from a YAML or JSON file.

    Parameters
    ----------
    path : Path
        The file.

    Returns
    -------
    values : dict
        Settings by name, unchecked.
    problems : list of str
        Why the file could not be read, if it could not.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        return {}, [f"the configuration {path} cannot be read: {reason}"]
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        return {}, [f"the configuration {path} is neither YAML nor JSON: {reason}"]
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        return {}, [f"the configuration {path} does not hold settings by name"]
    return values, []


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """Say that there is no such name, and which one was probably meant."""
    near = get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
    return f"unknown {what} {str(name)!r}: {hint}"


def raise_problems(problems: Sequence[str]) -> None:
    """Raise one `ConfigError` with all problems, if there are any."""
    if len(problems) == 1:
        raise ConfigError(problems[0])
    if problems:
        numbered = "; ".join(f"({i}) {text}" for i, text in enumerate(problems, 1))
        raise ConfigError(f"{len(problems)} problems with the configuration: {numbered}")


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _out_of_range(name: str, value: Any, limits: Mapping[str, Any]) -> list[str]:
    if isinstance(value, float) and not math.isfinite(value):
        return [f"{name}={value!r} is not a finite number"]
    if limits["choices"] and value not in limits["choices"]:
        return [unknown(name, value, limits["choices"])]
    if limits["low"] is not None and value < limits["low"]:
        return [f"{name}={value!r} is too small: at least {limits['low']:g}"]
    if limits["above"] is not None and value <= limits["above"]:
        return [f"{name}={value!r} is too small: more than {limits['above']:g}"]
    if limits["high"] is not None and value > limits["high"]:
        return [f"{name}={value!r} is too large: at most {limits['high']:g}"]
    return []


def _parse(value: Any, hint: Any) -> Any:
    """Return `value` as `hint` asks, or unchanged where it cannot be read so."""
    kinds = _kinds(hint)
    if isinstance(value, str):
        if type(None) in kinds and value.lower() in ("none", "null"):
            return None
        if bool in kinds:
            return {"true": True, "false": False}.get(value.lower(), value)
        if str in kinds:
            return value
        try:
            value = float(value) if not value.lstrip("+-").isdecimal() else int(value)
        except ValueError:
            return value
    if float in kinds and type(value) is int:
        return float(value)
    if int in kinds and isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _has_type(value: Any, hint: Any) -> bool:
    return type(value) in _kinds(hint) or (type(value) is int and float in _kinds(hint))


def _kinds(hint: Any) -> tuple[type, ...]:
    return getattr(hint, "__args__", (hint,))


def _type_name(hint: Any) -> str:
    names = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "a word",
        type(None): "none",
    }
    return " or ".join(names[kind] for kind in _kinds(hint))

"""The commands' options and the public names of Python: a change to either is a decision.

After an intended change, write the list anew with ``python tests/test_public_interface.py`` and
say it in CHANGELOG.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import rayvaec
import rayvaec.client
import rayvaec.data
from rayvaec.cli import build_parser

FROZEN = Path(__file__).parent / "fixtures" / "public_interface.txt"


def commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    (subparsers,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return dict(subparsers.choices)


def command_line() -> list[str]:
    """A line for each argument of each command: its names, and what it may be."""
    lines = []
    for verb, parser in sorted(commands(build_parser()).items()):
        for action in parser._actions:
            names = " ".join(action.option_strings) or action.dest
            choices = "" if action.choices is None else f" {{{','.join(map(str, action.choices))}}}"
            count = "" if action.nargs is None else f" nargs={action.nargs}"
            required = " required" if action.required and action.option_strings else ""
            lines.append(f"rayvaec {verb} {names}{choices}{count}{required}")
    return lines


def public_names() -> list[str]:
    """A line for each public name of the modules that users import."""
    lines = [
        f"{module.__name__}.{name}"
        for module in (rayvaec, rayvaec.client, rayvaec.data)
        for name in sorted(module.__all__)
    ]
    methods = [name for name in dir(rayvaec.TrainedModel) if not name.startswith("_")]
    lines += [f"rayvaec.TrainedModel.{name}" for name in methods]
    methods = [name for name in dir(rayvaec.client.Client) if not name.startswith("_")]
    return lines + [f"rayvaec.client.Client.{name}" for name in methods]


def interface() -> list[str]:
    return [*command_line(), *public_names()]


def test_commands_and_names_are_those_that_were_decided_on():
    assert interface() == FROZEN.read_text().splitlines()


if __name__ == "__main__":
    FROZEN.write_text("\n".join(interface()) + "\n")

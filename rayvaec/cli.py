"""The command `rayvaec`; its verbs are in `rayvaec.commands`.

Exit codes: 0; 1 for a failure in the work; 2 for a mistake in what was asked, said in one line.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import traceback
from collections.abc import Sequence
from difflib import get_close_matches
from typing import NoReturn

import rayvaec
from rayvaec.commands import bridge, check, data, demo, infer, serve, train
from rayvaec.errors import RayvaecError
from rayvaec.option_names import flags_in_messages


class _Parser(argparse.ArgumentParser):
    """A parser whose mistakes take one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Parameters
    ----------
    argv : Sequence[str], optional
        The words after ``rayvaec``; those of this process by default.

    Returns
    -------
    int
        The exit code.
    """
    arguments = _parse(argv)
    root, to_stderr = logging.getLogger(), logging.StreamHandler(sys.stderr)
    httpx = logging.getLogger("httpx")
    levels = root.level, httpx.level
    root.addHandler(to_stderr)
    root.setLevel(logging.INFO)
    httpx.setLevel(logging.WARNING)
    debug = getattr(arguments, "debug", False)
    # A stop by `kill` or `ray job stop` cleans up just as one by the keyboard does.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with flags_in_messages():
            return _run(arguments, debug)
    finally:
        signal.signal(signal.SIGTERM, before)
        root.removeHandler(to_stderr)
        root.setLevel(levels[0])
        httpx.setLevel(levels[1])


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command; what no option is called is a mistake in its verb."""
    parser = build_parser()
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        verb = verbs_of(parser)[arguments.verb]
        options = [name for name in verb._option_string_actions if name.startswith("--")]
        near = get_close_matches(unknown[0].split("=")[0], options, n=1)
        known = f" (did you mean {near[0]}?)" if near else ""
        verb.error(f"unrecognized arguments: {' '.join(unknown)}{known}")
    return arguments


def verbs_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Return the parser of each verb."""
    (verbs,) = (each for each in parser._actions if isinstance(each, argparse._SubParsersAction))
    return dict(verbs.choices)


def _run(arguments: argparse.Namespace, debug: bool) -> int:
    try:
        arguments.run(arguments)
    except RayvaecError as error:
        return _report(f"error: {error}", error.exit_code, debug)
    except KeyboardInterrupt:
        return _report("interrupted", 130, debug)
    except Exception as error:
        return _report(f"failed: {type(error).__name__}: {error} (see --debug)", 1, debug)
    return 0


def _report(message: str, exit_code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"rayvaec: {' '.join(message.split())}", file=sys.stderr)
    return exit_code


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands.

    Returns
    -------
    argparse.ArgumentParser
    """
    parser = _Parser(prog="rayvaec", description=rayvaec.__doc__)
    parser.add_argument("--version", action="version", version=f"rayvaec {rayvaec.__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="COMMAND")
    for add in (
        *(data.add_simulate, data.add_prepare, data.add_inspect),
        *(train.add_train, infer.add_bulk, check.add_check, serve.add_serve),
        *(bridge.add_bridge, demo.add_demo),
    ):
        add(verbs)
    for verb in verbs.choices.values():
        verb.add_argument("--debug", action="store_true", help="show where an error was raised")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())

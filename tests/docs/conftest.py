"""Run what the documents show: their blocks of code, in order, in one folder."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rayvaec.cli import main

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture
def run_document(
    ray_local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, Any]]:
    """Run the blocks of a document; returns the names that its Python has given.

    `own` runs commands, by the verb, that a test has to run in a way of its own.
    """
    monkeypatch.chdir(tmp_path)

    def run(name: str, own: dict[str, Callable[[list[str]], None]] | None = None) -> dict[str, Any]:
        text = (DOCS / name).read_text()
        names: dict[str, Any] = {"__name__": name}
        for language, code in re.findall(r"```(\w+)\n(.*?)```", text, flags=re.DOTALL):
            assert language in ("sh", "python"), language
            if language == "python":
                exec(compile(code, name, "exec"), names)
                continue
            for line in code.replace("\\\n", " ").splitlines():
                program, *words = shlex.split(line, comments=True) or [""]
                if program == "rayvaec":
                    perform = (own or {}).get(words[0], _perform)
                    perform(words)
                else:
                    assert not program, f"{name} shows a command that no test runs: {line}"
        return names

    return run


def _perform(words: list[str]) -> None:
    assert main(words) == 0, words

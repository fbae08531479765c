"""Every command that writes is alone at its output, and says who is there if it is not."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rayvaec.cli import build_parser, main

VERBS = {
    "simulate": ["--n-cells=20", "--n-genes=5", "--n-labels=2"],
    "prepare": ["INPUT", "--labels-key", "cell_type"],
    "prepare --append": ["INPUT"],
    "prepare --resume": ["INPUT", "--labels-key", "cell_type"],
    "train": ["STORE"],
    "train --resume": ["STORE"],
    "sample": ["MODEL", "STORE", "--n-samples=2"],
    "embed": ["MODEL", "STORE"],
    "expression": ["MODEL", "STORE"],
    "elbo": ["MODEL", "STORE"],
    "marginal-ll": ["MODEL", "STORE"],
    "de": ["MODEL", "STORE"],
    "vamp-prior": ["MODEL", "STORE"],
    "check": ["MODEL", "STORE"],
    "import": ["FOLDER"],
    "export": ["MODEL"],
    "demo": [],
}
"""What the verbs are given beside --out; their inputs do not exist, so that they end soon."""

TABLES = (".zarr", ".h5ad", ".csv", ".parquet")
FORMATS = {
    "simulate": (".h5ad", ".zarr"),
    "sample": (".zarr", ".h5ad"),
    "embed": TABLES,
    "expression": (".zarr", ".h5ad"),
    "elbo": TABLES,
    "marginal-ll": TABLES,
    "de": (".csv", ".parquet"),
    "vamp-prior": (".npz",),
}
"""Endings of the outputs that are not folders."""

HOLDS = """
import sys, time
from pathlib import Path
from typing import Any
from rayvaec.util.lock import WriteLock
with WriteLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def suffix(verb: str) -> str:
    """The format in which a verb writes."""
    return FORMATS.get(verb.split()[0], (".zarr",))[0]


@pytest.fixture
def start_holder() -> Iterator[Callable[[Path], subprocess.Popen[str]]]:
    """Start another process that writes an output; it is killed at the end."""
    holders: list[subprocess.Popen[str]] = []

    def start(out: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLDS, str(out)]
        holders.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert holders[-1].stdout is not None
        assert holders[-1].stdout.readline() == "held\n"
        return holders[-1]

    yield start
    for holder in holders:
        holder.kill()
        holder.communicate()


def words(verb: str, folder: Path) -> list[str]:
    """Return the command line of a verb, and of what it reads only names of nothing."""
    given = [word if word.islower() or "-" in word else str(folder / word) for word in VERBS[verb]]
    return [*verb.split(), *given, "--out", str(folder / f"out{suffix(verb)}")]


def test_every_verb_that_writes_is_looked_at() -> None:
    verbs = next(
        action.choices
        for action in build_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    write = {name for name, verb in verbs.items() if "--out" in verb._option_string_actions}
    assert write == {verb.split()[0] for verb in VERBS}


@pytest.mark.parametrize("overwrite", [False, True], ids=["", "overwrite"])
@pytest.mark.parametrize("stands", [False, True], ids=["new", "existing"])
@pytest.mark.parametrize("verb", VERBS)
def test_a_second_writer_is_refused_until_the_first_is_gone(
    verb: str,
    stands: bool,
    overwrite: bool,
    store_path: Path,
    tmp_path: Path,
    start_holder: Callable[[Path], subprocess.Popen[str]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rayvaec.demo._demo", lambda *_: None)  # takes minutes
    out = tmp_path / f"out{suffix(verb)}"
    if stands or "append" in verb:
        shutil.copytree(store_path, out)
    command = words(verb, tmp_path) + ["--overwrite"] * overwrite
    holder = start_holder(out)
    before = sorted(tmp_path.rglob("*"))
    code, said = main(command), capsys.readouterr().err
    if verb == "train --resume" and overwrite:
        assert "exclude each other" in said
        return
    assert code == 2, said
    assert f"process {holder.pid} on {os.uname().nodename} (since 20" in said
    assert f"is writing {out}; wait until it has ended" in said
    assert sorted(tmp_path.rglob("*")) == before

    holder.send_signal(signal.SIGKILL)
    holder.wait()
    main(command)
    assert "is writing" not in capsys.readouterr().err
    assert not list(tmp_path.glob(".out*"))


def test_a_writer_does_not_keep_readers_away(
    store_path: Path, tmp_path: Path, start_holder: Callable[[Path], subprocess.Popen[str]]
) -> None:
    store = tmp_path / "store"
    shutil.copytree(store_path, store)
    start_holder(store)
    assert main(["inspect", str(store), "--verify"]) == 0


@pytest.mark.parametrize("name", ["out.h5ad", "out.csv", "out.CSV", "out", "out.v2", "out.npz.gz"])
@pytest.mark.parametrize("verb", [verb for verb in VERBS if "--" not in verb])
def test_a_name_that_promises_another_format_is_refused_before_any_work(
    verb: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr("rayvaec.demo._demo", lambda *_: None)  # takes minutes
    out = tmp_path / name
    command = [*words(verb, tmp_path)[:-1], str(out)]
    code, said = main(command), capsys.readouterr().err
    is_right = out.suffix.lower() in FORMATS.get(verb, ("", ".v2"))
    refused = f"{out} will be a folder" in said or f"{out} does not end in a format" in said
    assert refused == (not is_right), said
    if refused:
        assert code == 2
        assert "choose a name that" in said
        assert not list(tmp_path.iterdir())

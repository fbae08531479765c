"""Messages name options as their reader gives them: flags on the command line, or arguments."""

from __future__ import annotations

import argparse
import ast
import inspect
import logging
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import rayvaec
from rayvaec.cli import build_parser, main, verbs_of
from rayvaec.data.prepare.pipeline import PrepareConfig, prepare
from rayvaec.datasets import write_atlas
from rayvaec.errors import RayvaecError, RequestError
from rayvaec.inference.analyses.differential import Comparison
from rayvaec.inference.bulk import api
from rayvaec.inference.ppc.config import CheckConfig
from rayvaec.inference.ppc.run import check_store
from rayvaec.model.scvi.importer import export_condscvi, import_model
from rayvaec.option_names import ARGUMENTS, SWITCHES, addressed, flags_in_messages
from rayvaec.serving.deployment import run as serve
from rayvaec.training.config import TrainConfig
from rayvaec.training.driver.trainer import train

PUBLIC = (
    *(prepare, PrepareConfig, write_atlas, train, TrainConfig, check_store, CheckConfig),
    *(import_model, export_condscvi, serve, Comparison),
    *(api.sample_store, api.embed_store, api.expression_store, api.elbo_store),
    *(api.marginal_ll_store, api.differential_expression_store, api.vamp_prior_store),
)
FLAG = re.compile(r"(?<![\w-])--([a-z][a-z0-9-]*[a-z0-9])")


@pytest.mark.parametrize(
    ("text", "in_python"),
    [
        ("choose another --out or --overwrite", "choose another `out` or `overwrite=True`"),
        ("--n-cells is 0", "`n_cells` is 0"),
        ("use --num-workers 4 or fewer", "use `num_workers=4` or fewer"),
        ("give --genes=FILE, or --genes=union", "give `genes=FILE`, or `genes='union'`"),
        ("such as --layer='raw counts' (or X)", "such as `layer='raw counts'` (or X)"),
        ("with --resume 3 cells", "with `resume=True` 3 cells"),
        ("a lower --set lr=0.01; or --set a=b", "a lower `lr=0.01`; or `a=b`"),
        ("--allowed-host NAME", "`allowed_hosts=NAME`"),
        ("as `rayvaec prepare X --out STORE` does", "as `rayvaec prepare X --out STORE` does"),
        ("the label CD4--like and a --- line", "the label CD4--like and a --- line"),
    ],
)
def test_python_reads_of_arguments_and_the_command_line_of_flags(text: str, in_python: str) -> None:
    assert addressed(text) == in_python
    error = pickle.loads(pickle.dumps(RayvaecError(text, text)))
    assert (error.detail, error.fix, str(error)) == (in_python,) * 2 + (
        f"{in_python}; {in_python}",
    )
    request = pickle.loads(pickle.dumps(RequestError(text, "", 418, "teapot", "id")))
    assert (str(request), request.status, request.request_id) == (in_python, 418, "id")
    with flags_in_messages():
        assert addressed(text) == str(request) == error.fix == text
    assert str(request) == in_python


def test_so_does_who_reads_the_log(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        logging.getLogger("rayvaec").warning("%s has it: use --overwrite", "the --path")
        with flags_in_messages():
            logging.getLogger("rayvaec").warning("use --overwrite")
    assert caplog.messages == ["the --path has it: use `overwrite=True`", "use --overwrite"] * 2


def options() -> Iterator[argparse.Action]:
    for verb in verbs_of(build_parser()).values():
        yield from (action for action in verb._actions if action.option_strings)


def test_the_flags_without_a_value_are_known() -> None:
    found = {action.option_strings[0][2:] for action in options() if action.nargs == 0}
    assert found - {"", "h", "help", "debug"} == SWITCHES


def texts(path: Path) -> Iterator[str]:
    """Every text of a module but its docstrings; what is filled in is not seen."""
    tree = ast.parse(path.read_text())
    docstrings = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and id(node) not in docstrings:
            yield str(node.value)


def test_messages_name_options_that_there_are() -> None:
    package = Path(rayvaec.__file__).parent
    commands = {package / "cli.py", package / "demo.py", *(package / "commands").rglob("*.py")}
    flags = {action.option_strings[0][2:] for action in options()}
    arguments = {name for public in PUBLIC for name in inspect.signature(public).parameters}
    named = {
        (flag, path.name)
        for path in sorted(set(package.rglob("*.py")) - commands)
        for text in texts(path)
        for flag in FLAG.findall(re.sub(r"`[^`]*`", "", text))
    }
    assert len(named) > 50
    assert {each for each in named if each[0] not in flags} == set()
    spelt = {each: ARGUMENTS.get(each[0], each[0].replace("-", "_")) for each in named}
    settings = {("set", path) for _, path in named}
    assert {each for each in named - settings if spelt[each] not in arguments} == set()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda _, model, store, out: write_atlas(out), "simulate --out OUT"),
        (
            lambda atlas, _, store, out: prepare([atlas], out, PrepareConfig("cell_type")),
            "prepare ATLAS --out OUT --labels-key cell_type",
        ),
        (lambda _, model, store, out: train(store, out), "train STORE --out OUT"),
        (lambda _, model, store, out: import_model(model, out), "import MODEL --out OUT"),
        (lambda _, model, store, out: export_condscvi(model, out), "export MODEL --out OUT"),
        (lambda _, *paths: check_store(*paths), "check MODEL STORE --out OUT"),
        (lambda _, *paths: api.sample_store(*paths, 1), "sample MODEL STORE --out OUT -n 1"),
        (lambda _, *paths: api.embed_store(*paths), "embed MODEL STORE --out OUT"),
        (lambda _, *paths: api.elbo_store(*paths), "elbo MODEL STORE --out OUT"),
        (lambda _, *paths: api.expression_store(*paths), "expression MODEL STORE --out OUT"),
        (lambda _, *paths: api.marginal_ll_store(*paths), "marginal-ll MODEL STORE --out OUT"),
        (lambda _, *paths: api.vamp_prior_store(*paths), "vamp-prior MODEL STORE --out OUT"),
        (
            lambda _, *paths: api.differential_expression_store(*paths),
            "de MODEL STORE --out OUT",
        ),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)
def test_what_stands_in_the_way_is_refused_to_both(
    call: Callable[..., Any],
    words: str,
    atlas_h5ad: Path,
    model_path: Path,
    store_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ending = {"vamp-prior": ".npz", "de": ".csv"}.get(words.split()[0], ".zarr")
    out = tmp_path / f"out{ending}"
    out.mkdir()
    (out / "kept").write_text("")
    with pytest.raises(RayvaecError) as caught:
        call(atlas_h5ad, model_path, store_path, out)
    assert "exist" in str(caught.value)
    assert "another `out`" in str(caught.value)
    assert not FLAG.search(str(caught.value))
    paths = {"ATLAS": atlas_h5ad, "MODEL": model_path, "STORE": store_path, "OUT": out}
    words = words.replace("-n 1", "--n-samples 1")
    assert main([str(paths.get(word, word)) for word in words.split()]) == 2
    said = capsys.readouterr().err
    assert "another --out" in said
    assert "`" not in said

"""No public function of `rayvaec.inference` changes what it is given, in whatever form it comes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from anndata_state import state
from every_function import Case, World, cases, outline
from scipy import sparse

from rayvaec.errors import ConfigError, ModelError
from rayvaec.inference.cells import Cells
from rayvaec.inference.trained_model import TrainedModel

CASES = cases()
METHODS = [case for case in CASES if case.owner is TrainedModel]


def _with_zeros(x: sparse.csr_matrix) -> sparse.csr_matrix:
    """Store a zero beside every entry, as the removal of ambient RNA leaves them."""
    dense = x.toarray()
    rows, columns = np.nonzero(np.ones_like(dense))
    kept = (dense[rows, columns] > 0) | ((rows + columns) % 3 == 0)
    ends = np.searchsorted(rows[kept], np.arange(len(dense) + 1))
    parts = dense[rows[kept], columns[kept]], columns[kept], ends
    return sparse.csr_matrix(parts, shape=x.shape)


def _in_parts(x: sparse.csr_matrix) -> sparse.csr_matrix:
    """Store every count as a one and the rest, the later genes first."""
    data, indices, indptr = x.data, x.indices, x.indptr
    rows = [slice(a, b) for a, b in pairwise(indptr)]
    parts = [np.concatenate([np.ones_like(data[row]), data[row] - 1])[::-1] for row in rows]
    genes = [np.concatenate([indices[row], indices[row]])[::-1] for row in rows]
    return sparse.csr_matrix((np.concatenate(parts), np.concatenate(genes), 2 * indptr), x.shape)


FORMS_OF_X: dict[str, Callable[[sparse.csr_matrix], Any]] = {
    "csr": lambda x: x.astype(np.int32),
    "csr of floats": lambda x: x.astype(np.float32),
    "csr of bytes": lambda x: x.astype(np.uint8),
    "zeros": _with_zeros,
    "parts": _in_parts,
    "csc": lambda x: _with_zeros(x).tocsc(),
    "dense": lambda x: x.toarray(),
    "dense, column by column": lambda x: np.asfortranarray(x.toarray().astype(">f4")),
}
PLACES = ("X", "view", "layer", "raw", "backed")


def placed(adata: anndata.AnnData, place: str, folder: Path) -> tuple[anndata.AnnData, dict]:
    """Put the counts elsewhere; return the arguments that find them."""
    if place == "view":
        twice = anndata.concat([adata, adata], index_unique="-")
        twice.obs_names = [*adata.obs_names, *(f"other {name}" for name in adata.obs_names)]
        return twice[: adata.n_obs], {}
    if place == "layer":
        adata.layers["counts"], adata.X = adata.X, np.full(adata.shape, 0.5)
        return adata, {"layer": "counts"}
    if place == "raw":
        adata.raw = adata.copy()
        adata.X = np.full(adata.shape, 0.5)
        return adata, {"layer": "raw"}
    if place == "backed":
        adata.write_h5ad(folder / "backed.h5ad")
        return anndata.read_h5ad(folder / "backed.h5ad", backed="r"), {}
    return adata, {}


def same(one: Any, two: Any) -> bool:
    """Return whether results are equal, bit by bit."""
    if isinstance(one, pd.DataFrame):
        return one.equals(two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if sparse.issparse(one):
        return same(one.toarray(), two.toarray())
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return np.array_equal(one, two, equal_nan=np.asarray(one).dtype.kind == "f")


@pytest.mark.parametrize("case", METHODS, ids=lambda case: case.function.__name__)
def test_methods_keep_the_adata_whatever_it_holds(case: Case, tmp_path: Path) -> None:
    world = World(tmp_path, "softmax-batches")
    x = sparse.csr_matrix(world.adata.X)
    expected = _called(case, world, world.adata, {})
    forms = [(form, "X") for form in FORMS_OF_X] + [("zeros", place) for place in PLACES[1:]]
    for form, place in forms:
        made = FORMS_OF_X[form](x)
        adata = anndata.AnnData(made, world.adata.obs.copy(), world.adata.var.copy())
        given, options = placed(adata, place, tmp_path)
        before = state(given)
        found = _called(case, world, given, options)
        assert state(given) == before, f"{form} in {place} was changed"
        assert same(found, expected), f"{form} in {place} gives another result"
        if given.isbacked:
            given.file.close()


def _called(case: Case, world: World, adata: anndata.AnnData, options: dict[str, Any]) -> Any:
    method = case.function.__get__(world.model)
    try:
        return world.called(method, adata=adata, **options)
    except (ConfigError, ModelError) as error:  # a form that has no fine labels
        return str(error)


class Recorded(World):
    """A world that remembers what it gave."""

    given: list[Any]

    def argument(self, name: str, annotation: str) -> Any:
        """Return what a parameter of a function wants."""
        value = super().argument(name, annotation)
        self.given.append((name, value, snapshot(value)))
        return value


def snapshot(value: Any) -> Any:
    """Return a copy of arrays and of what consists of arrays; None for anything else."""
    if isinstance(value, anndata.AnnData):
        return state(value)
    if isinstance(value, np.ndarray | torch.Tensor):
        return copy.deepcopy(value)
    if isinstance(value, Cells):
        return snapshot(list(vars(value).values()))
    if isinstance(value, list | tuple):
        return [snapshot(part) for part in value]
    return None


@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: case.name.removeprefix("rayvaec.inference.")
)
def test_functions_keep_their_arrays(case: Case, tmp_path: Path) -> None:
    world = Recorded(tmp_path, "mog")  # the form that refuses fewest
    world.given = []
    weights = snapshot(list(world.module.state_dict().values()))
    with suppress(ConfigError, ModelError):  # what the model's form refuses
        outline(case.run(world))
    for name, value, before in world.given:
        assert same(snapshot(value), before) or before is None, f"{name} was changed"
    assert same(list(world.module.state_dict().values()), weights)


def test_the_forms_are_what_they_say(tmp_path: Path) -> None:
    x = sparse.csr_matrix(World(tmp_path, "softplus").adata.X)
    for form, made in FORMS_OF_X.items():
        matrix = made(x)
        assert (matrix != x).sum() == 0 if sparse.issparse(matrix) else (matrix == x).all(), form
    assert (_with_zeros(x).data == 0).sum() > 10
    assert not _in_parts(x).has_canonical_format
    assert _in_parts(x).nnz == 2 * x.nnz

"""Responses as h5ad files."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from rayvaec.data.registry import Registry
from rayvaec.errors import UnprocessableError
from rayvaec.inference.cells import Cells


@dataclass(frozen=True)
class Annotation:
    """What an answer's rows and columns are.

    Parameters
    ----------
    cells : Cells
        The cells, in the model's codes.
    names : sequence of str, optional
        Of the cells; their positions by default.
    columns : array[n_out] of int64, optional
        Genes of the answer; all by default.
    facts : mapping
        What the answer says beside its rows.
    """

    cells: Cells
    names: Sequence[str | None] | None
    columns: NDArray[np.int64] | None
    facts: Mapping[str, Any]


def check_writable(about: Annotation) -> None:
    """Refuse names that an h5ad file cannot hold.

    Parameters
    ----------
    about : Annotation
        Of the answer's rows and columns.

    Raises
    ------
    RequestError
        422 if a name of a cell, or of a gene that is reported, has a NUL in it.
    """
    lists = [fact for fact in about.facts.values() if isinstance(fact, list)]
    for name in chain(about.names or (), *lists):
        if "\0" in str(name):
            raise UnprocessableError(
                f"the name {str(name)[:60]!r} has a NUL in it, which HDF5's strings cannot hold",
                "name it otherwise, or take the answer as Arrow or JSON",
            )


def write_h5ad(
    about: Annotation, registry: Registry, layers: Mapping[str, Any], obsm: Mapping[str, Any]
) -> bytes:
    """Write an answer.

    Parameters
    ----------
    about : Annotation
        Of its rows and columns.
    registry : Registry
        The model's names.
    layers : mapping
        Matrices, cells x genes, sparse or dense.
    obsm : mapping
        Matrices, cells x anything.

    Returns
    -------
    bytes
        An h5ad file; its ``uns["rayvaec"]`` has the facts.
    """
    import anndata
    import pandas as pd
    from anndata.io import write_elem

    n_cells = len(about.cells)
    names = [str(i) for i in range(n_cells)] if about.names is None else list(about.names)
    obs = {registry.labels_key: _categorical(about.cells.labels, registry.labels)}
    if registry.batch_key is not None and about.cells.batches is not None:
        obs[registry.batch_key] = _categorical(about.cells.batches, registry.batches)
    genes = np.asarray(registry.genes, object)
    if about.columns is not None:
        genes = genes[about.columns]
    facts = {
        name: np.array(fact, dtype=str) if isinstance(fact, list) else fact
        for name, fact in about.facts.items()
    }
    adata = anndata.AnnData(
        obs=pd.DataFrame(obs, index=pd.Index(names, dtype=object)),
        var=pd.DataFrame(index=pd.Index(genes, dtype=object)),
        layers=dict(layers),
        obsm=dict(obsm),
        uns={"rayvaec": facts},
    )
    file = io.BytesIO()
    with h5py.File(file, "w") as h5:
        write_elem(h5, "/", adata)
    return file.getvalue()


def _categorical(codes: NDArray[np.int64], categories: Sequence[str]) -> Any:
    import pandas as pd

    return pd.Categorical.from_codes(codes, list(categories))

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from rayvaec.data.registry import Registry, inverse
from rayvaec.errors import CountsError

REGISTRY = Registry(("A", "B", "C"), ("b cell", "t cell"), "kind", ("x", "y"), "donor")
PLAIN = Registry(("A", "B", "C"), ("b cell", "t cell"), "kind")


def make(x, genes=("C", "extra", "A", "B"), kind=("t cell", "b cell"), **obs):
    frame = pd.DataFrame({"kind": list(kind), **obs}, index=[f"n{i}" for i in range(x.shape[0])])
    return anndata.AnnData(x, frame, pd.DataFrame(index=list(genes)))


X = np.array([[1, 2, 0, 4], [0, 0, 7, 0]], dtype=np.float32)
ALIGNED = [[0, 4, 1], [7, 0, 0]]


def dense(cells):
    shape = (len(cells.labels), 3)
    return sparse.csr_array((cells.counts, cells.indices, cells.indptr), shape).toarray().tolist()


def test_json_keeps_everything():
    for registry in (REGISTRY, PLAIN):
        again = Registry.from_json(registry.to_json())
        assert again == registry
        assert again.hash() == registry.hash()
    assert (REGISTRY.n_genes, REGISTRY.n_labels, REGISTRY.n_batches) == (3, 2, 2)


def test_the_hash_follows_order_and_keys():
    others = [
        PLAIN,
        Registry(("B", "A", "C"), ("b cell", "t cell"), "kind"),
        Registry(("A", "B", "C"), ("t cell", "b cell"), "kind"),
        Registry(("A", "B", "C"), ("b cell", "t cell"), "type"),
        REGISTRY,
    ]
    assert len({registry.hash() for registry in others}) == len(others)
    assert all(len(registry.hash()) == 64 for registry in others)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"genes": None}, "'genes' must be a list"),
        ({"genes": ["A", 1]}, "'genes' must be a list"),
        ({"genes": ["A", "A"]}, "1 gene names more than once: A"),
        ({"labels": ["l", "l"]}, "1 label names more than once: l"),
        ({"labels_key": 3}, "'labels_key' must be a string, not 3"),
        ({"batch_key": None}, "2 batches and batch key None"),
        ({"batches": []}, "0 batches and batch key 'donor'"),
    ],
)
def test_json_that_is_no_registry_is_refused(change, named):
    with pytest.raises(CountsError, match=named):
        Registry.from_json({**REGISTRY.to_json(), **change})
    with pytest.raises(CountsError, match="not list"):
        Registry.from_json([])


def test_labels_become_codes():
    values = ["t cell", "b cell", "t cell"]
    for form in (values, np.array(values), pd.Series(values), pd.Categorical(values)):
        codes = REGISTRY.encode_labels(form, "obs")
        assert codes.dtype == np.int64
        assert codes.tolist() == [1, 0, 1]
    assert REGISTRY.encode_labels([], "obs").tolist() == []
    assert REGISTRY.encode_batches(["y", "x"], "obs").tolist() == [1, 0]


def test_numbers_are_read_as_their_text():
    registry = Registry(("A",), ("1", "2"), "cluster")
    assert registry.encode_labels([2, "1", np.int64(1)], "obs").tolist() == [1, 0, 0]


def test_an_unknown_label_is_named_with_the_valid_ones():
    with pytest.raises(CountsError) as caught:
        REGISTRY.encode_labels(["b cell", "t-cell", "t-cell"], "adata.obs['kind']")
    assert "adata.obs['kind'] has the unknown label 't-cell' (2 of 3 cells" in str(caught.value)
    assert "the first at position 1" in str(caught.value)
    assert caught.value.fix == "valid ones are t cell, b cell"


@pytest.mark.parametrize("missing", [None, np.nan, np.float32("nan"), pd.NA, pd.NaT])
def test_missing_labels_are_counted(missing):
    with pytest.raises(CountsError, match=r"no label for 2 of 4 cells, the first at position 1"):
        REGISTRY.encode_labels(["b cell", missing, "t cell", missing], "obs")


def test_genes_are_found_by_name():
    found = PLAIN.align_genes(["C", "D", "A"])
    assert found.columns.tolist() == [2, -1, 0]
    assert (found.missing, found.extra) == (("B",), ("D",))
    assert inverse(found.columns, 3).tolist() == [2, -1, 0]
    with pytest.raises(CountsError, match=r"panel has 2 gene names more than once: A, B"):
        PLAIN.align_genes(["A", "B", "A", "B", "C"], "panel")


@pytest.mark.parametrize(
    "form", [np.asarray, sparse.csr_matrix, sparse.csc_matrix, sparse.csr_array]
)
@pytest.mark.parametrize("dtype", ["f4", "f8", "i4", "i8", "u2"])
def test_cells_are_aligned_from_every_form(form, dtype):
    cells = PLAIN.align(make(form(X.astype(dtype))))
    assert dense(cells) == ALIGNED
    assert (cells.indptr.dtype, cells.indices.dtype, cells.counts.dtype) == ("i8", "i4", "i4")
    assert cells.indptr.tolist() == [0, 2, 3]
    assert cells.labels.tolist() == [1, 0]
    assert cells.batches is None
    assert cells.names == ["n0", "n1"]
    assert (cells.missing, cells.extra) == ((), ("extra",))


def test_batches_and_another_labels_column_are_read():
    adata = make(X, kind=("?", "?"), donor=["y", "x"], cluster=["b cell", "b cell"])
    cells = REGISTRY.align(adata, labels_key="cluster")
    assert cells.labels.tolist() == [0, 0]
    assert cells.batches.tolist() == [1, 0]


def test_layers_raw_and_backed_files_are_read(tmp_path):
    adata = make(sparse.csr_matrix(X))
    adata.layers["counts"] = adata.X.copy()
    adata.raw = adata.copy()
    adata = adata[:, ["B", "A", "extra"]].copy()
    adata.X = np.full(adata.shape, 0.5)
    assert dense(PLAIN.align(adata, layer="raw")) == ALIGNED
    cells = PLAIN.align(adata, layer="counts", allow_missing=True)
    assert dense(cells) == [[0, 4, 0], [7, 0, 0]]
    with pytest.raises(CountsError, match=r"adata.X: 0.5 at cell n0, gene B .* layer='counts'"):
        PLAIN.align(adata, allow_missing=True)
    with pytest.raises(CountsError, match=r"cells has no layer 'count'; the layers are counts"):
        PLAIN.align(adata, layer="count", where="cells")
    path = tmp_path / "backed.h5ad"
    make(sparse.csr_matrix(X)).write_h5ad(path)
    backed = anndata.read_h5ad(path, backed="r")
    assert dense(PLAIN.align(backed)) == ALIGNED
    backed.file.close()


def test_missing_genes_are_an_error_unless_allowed():
    adata = make(X, genes=("C", "D", "A", "E"))
    with pytest.raises(CountsError, match=r"adata lacks 1 of 3 genes: B; .*allow_missing=True"):
        PLAIN.align(adata)
    cells = PLAIN.align(adata, allow_missing=True)
    assert dense(cells) == [[0, 0, 1], [7, 0, 0]]
    assert (cells.missing, cells.extra) == (("B",), ("D", "E"))
    strange = make(X, genes=("ENSG1", "ENSG2", "ENSG3", "ENSG4"))
    with pytest.raises(CountsError, match=r"none of the 3 genes .*A, B, C; .*ENSG1, ENSG2, ENSG3"):
        PLAIN.align(strange, allow_missing=True)


def test_a_missing_column_or_matrix_is_named():
    adata = make(X, state=["a", "b"])
    with pytest.raises(
        CountsError, match=r"adata.obs has no column 'knd'; the columns are kind, state"
    ):
        PLAIN.align(adata, labels_key="knd")
    empty = anndata.AnnData(obs=adata.obs, var=adata.var, layers={"raw counts": X})
    with pytest.raises(CountsError, match=r"adata has no X; name a layer: raw counts"):
        PLAIN.align(empty)


def test_unsorted_rows_zeros_and_repeated_entries_are_put_right():
    x = sparse.csr_matrix((2, 4), dtype=np.float32)
    x.data, x.indices = np.array([4, 1, 0, 2, 5], "f4"), np.array([3, 0, 2, 3, 2], "i4")
    x.indptr = np.array([0, 4, 5], "i4")
    cells = PLAIN.align(make(x))
    assert dense(cells) == [[0, 6, 1], [5, 0, 0]]
    assert cells.indices.tolist() == [1, 2, 0]
    assert cells.indptr.tolist() == [0, 2, 3]

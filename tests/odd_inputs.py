"""Odd and bad AnnData on disk, by name: as old versions, other tools and accidents leave them.

`ODD` has what stands in one file. Each is written by `write_odd` as h5ad or Zarr, and is either
read as the counts of `make_counts` with its labels, or refused with a message that its pattern
finds.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import zarr
from anndata.io import write_elem
from scipy import sparse

N_CELLS, N_GENES = 12, 6
GENES = [f"g{gene}" for gene in range(N_GENES)]
KEY = "label"


def make_counts() -> np.ndarray:
    """Counts of a few cells, some of them zero, with none empty."""
    x = np.random.default_rng(0).poisson(1.2, (N_CELLS, N_GENES))
    x[:, 0] += 1
    return x


def make_cells(prefix: str = "c", labels: tuple[object, ...] = ("a", "b", "c")) -> anndata.AnnData:
    """Cells with these counts, named by their prefix, each with the next of the labels."""
    names = [f"{prefix}{cell}" for cell in range(N_CELLS)]
    values = pd.Categorical([labels[cell % len(labels)] for cell in range(N_CELLS)])
    obs = pd.DataFrame({KEY: values, "batch": ["x", "y"] * (N_CELLS // 2)}, index=names)
    x = sparse.csr_matrix(make_counts().astype(np.float32))
    return anndata.AnnData(x, obs, pd.DataFrame(index=GENES))


@dataclass(frozen=True)
class Odd:
    """One odd input.

    Parameters
    ----------
    make : callable
        Changes the AnnData before it is written.
    change : callable
        Changes the file, a group of h5py or zarr, afterwards.
    refused : str, optional
        What a refusal says, a pattern; None for what is read.
    labels : tuple of str
        The names of the labels "a", "b" and "c".
    layer : str, optional
        Layer with the counts.
    external : str, optional
        What `train` says of it on a store that is read as it lies, where others read it.
    h5ad_only : str
        Why it cannot be a Zarr, if it cannot.
    """

    make: Callable[[anndata.AnnData], None] = lambda adata: None
    change: Callable[[Any], None] = lambda root: None
    refused: str | None = None
    labels: tuple[str, ...] = ("a", "b", "c")
    layer: str | None = None
    external: str | None = None
    h5ad_only: str = ""


def write_odd(odd: Odd, path: Path, prefix: str = "c") -> Path:
    """Write an odd input; its form follows from the path's suffix."""
    adata = make_cells(prefix)
    odd.make(adata)
    root: Any = (
        zarr.open_group(path, mode="w", zarr_format=3)
        if path.suffix == ".zarr"
        else h5py.File(path, "w")
    )
    with anndata.settings.override(allow_write_nullable_strings=True, auto_shard_zarr_v3=True):
        write_elem(root, "/", adata)
        if path.suffix == ".zarr":  # as AnnData.write_zarr does; what is changed later is not in it
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Consolidated metadata is currently not")
                zarr.consolidate_metadata(path)
        odd.change(root)
    if isinstance(root, h5py.File):
        root.close()
    return path


def put(path: str, values: Any, *, bare: bool = False, **attributes: Any) -> Callable[[Any], None]:
    """Return a change that puts an array in place of what stands at a path."""

    def change(root: Any) -> None:
        if path in root:
            del root[path]
        write_elem(root, path, values)
        if bare:
            for name in list(root[path].attrs):
                del root[path].attrs[name]
        root[path].attrs.update(attributes)

    return change


def several(*changes: Callable[[Any], None]) -> Callable[[Any], None]:
    """Return a change that makes several."""

    def change(root: Any) -> None:
        for each in changes:
            each(root)

    return change


def drop(path: str, attribute: str) -> Callable[[Any], None]:
    """Return a change that takes an attribute away."""
    return lambda root: root[path].attrs.__delitem__(attribute)


def relabelled(*values: object, dtype: Any = None) -> Callable[[anndata.AnnData], None]:
    """Return a change of labels to these, in turns."""

    def make(adata: anndata.AnnData) -> None:
        every = [values[cell % len(values)] for cell in range(N_CELLS)]
        adata.obs[KEY] = pd.array(every, dtype) if dtype else every

    return make


def assigned(
    columns: Callable[[anndata.AnnData], dict[str, Any]],
) -> Callable[[anndata.AnnData], None]:
    """Return a change of columns of obs."""
    return lambda adata: setattr(adata, "obs", adata.obs.assign(**columns(adata)))


def with_value(value: float) -> Callable[[anndata.AnnData], None]:
    """Return a change of one count, that of cell 2 and gene 0."""

    def make(adata: anndata.AnnData) -> None:
        adata.X = adata.X.astype(np.float64)
        adata.X[2, 0] = value

    return make


def as_type(dtype: Any) -> Callable[[Any], None]:
    """Return a change of the type that counts are stored in."""

    def change(root: Any) -> None:
        values = root["X/data"][:].astype(dtype)
        del root["X/data"]
        if isinstance(root, h5py.File):
            root["X/data"] = values
        else:
            root["X"].create_array("data", data=values)

    return change


CODES = np.arange(N_CELLS) % 3


def with_codes(codes: Any) -> Callable[[Any], None]:
    """Return a change of the labels' codes."""
    return put(f"obs/{KEY}/codes", np.asarray(codes, np.int8))


def as_anndata_07(root: Any) -> None:
    """Write the labels as anndata 0.7 did: codes, whose categories stand in the order of text."""
    categories = np.array(["a", "b", "c"], object)
    put(f"obs/{KEY}", CODES.astype(np.int8), bare=True)(root)
    root["obs"].create_group("__categories")
    put(f"obs/__categories/{KEY}", categories, bare=True)(root)
    column = root[f"obs/{KEY}"]
    if isinstance(root, h5py.File):
        column.attrs["categories"] = root[f"obs/__categories/{KEY}"].ref
    else:
        column.attrs["categories"] = f"__categories/{KEY}"
    root["obs"].attrs["encoding-version"] = "0.1.0"


def as_anndata_06(root: h5py.File) -> None:
    """Write obs, var and X as anndata 0.6 did, and what `adata.raw` was then."""
    text = h5py.string_dtype()
    for frame, n, prefix in (("obs", N_CELLS, "c"), ("var", N_GENES, "g")):
        names = [f"{prefix}{number}" for number in range(n)]
        table = np.empty(n, [("index", text), (KEY, "i1"), ("batch", "<i8")])
        table["index"], table[KEY], table["batch"] = names, np.arange(n) % 3, 0
        del root[frame]
        root[frame] = table
    root[f"uns/{KEY}_categories"] = np.array(["a", "b", "c"], text)
    attributes = root["X"].attrs
    for name in ("encoding-type", "encoding-version", "shape"):
        del attributes[name]
    attributes.update({"h5sparse_format": "csr", "h5sparse_shape": (N_CELLS, N_GENES)})
    del root.attrs["encoding-type"]


def raw_of_anndata_06(root: h5py.File) -> None:
    """Put the counts where anndata 0.6 kept `adata.raw`, and something else into X."""
    as_anndata_06(root)
    root.copy("X", "raw.X")
    root.copy("var", "raw.var")
    root["X/data"][:] *= 0.5


def normalised(adata: anndata.AnnData) -> None:
    """Keep counts in `adata.raw`, and normalise X."""
    adata.raw = adata.copy()
    adata.X = sparse.csr_matrix(np.log1p(adata.X.toarray()))


def with_layer(adata: anndata.AnnData) -> None:
    """Keep counts in a layer."""
    adata.layers["counts"] = adata.X.copy()
    adata.X = adata.X * 0.5


def in_another_order(adata: anndata.AnnData) -> None:
    """Store the genes of every cell backwards."""
    x = adata.X
    for start, stop in zip(x.indptr, x.indptr[1:], strict=False):
        x.indices[start:stop] = x.indices[start:stop][::-1]
        x.data[start:stop] = x.data[start:stop][::-1]
    x.has_sorted_indices = False


def with_duplicates(adata: anndata.AnnData) -> None:
    """Store the first count of every cell in two parts, of which the first is zero."""
    rows = [np.r_[0, row.indices] for row in adata.X]
    data = [np.r_[0.0, row.data] for row in adata.X]
    ends = np.cumsum([0, *map(len, rows)])
    adata.X = sparse.csr_matrix(
        (np.concatenate(data).astype("f4"), np.concatenate(rows), ends), adata.shape
    )


def formed(form: Callable[[Any], Any]) -> Callable[[anndata.AnnData], None]:
    """Return a change of the matrix's form."""
    return lambda adata: setattr(adata, "X", form(adata.X))


NAMES = np.array(["a", "b", "c"], object)

ODD = {
    "a plain one": Odd(),
    # Labels that are refused.
    "a label is missing": Odd(
        lambda adata: adata.obs.loc.__setitem__(("c3", KEY), None),
        refused=f"obs column '{KEY}' has no value for 1 of 12 cells, the first c3",
    ),
    "one code too many": Odd(
        change=with_codes(np.arange(13) % 3), refused=f"13 values in column '{KEY}' for 12 rows"
    ),
    "one code too few": Odd(
        change=with_codes(np.arange(11) % 3), refused=f"11 values in column '{KEY}' for 12 rows"
    ),
    "one label too few": Odd(
        change=put(f"obs/{KEY}", np.array(["a"] * 11, object)),
        refused=f"11 values in column '{KEY}' for 12 rows",
    ),
    "a code too large": Odd(
        change=with_codes([0, 1, 3, *CODES[3:]]), refused=f"code 3 of row 2 in column '{KEY}'"
    ),
    "a code below -1": Odd(
        change=with_codes([0, -2, *CODES[2:]]), refused=f"code -2 of row 1 in column '{KEY}'"
    ),
    "codes that are floats": Odd(
        change=put(f"obs/{KEY}/codes", CODES.astype(float)),
        refused=f"codes of type float64 in column '{KEY}'",
    ),
    "a category twice": Odd(
        change=put(f"obs/{KEY}/categories", np.array(["a", "b", "a"], object)),
        refused=f"category 'a' of column '{KEY}' more than once",
    ),
    "no such column": Odd(
        lambda adata: adata.obs.rename(columns={KEY: "labels"}, inplace=True),
        refused=f"no obs column '{KEY}'; the columns are labels, batch",
    ),
    "a column that column-order names alone": Odd(
        change=lambda root: root.__delitem__(f"obs/{KEY}"),
        refused=f"names the column '{KEY}' and does not have it",
    ),
    "categories of anndata 0.7 that are gone": Odd(
        change=several(as_anndata_07, lambda root: root.__delitem__(f"obs/__categories/{KEY}")),
        refused=f"refers to categories of column '{KEY}' that do not exist",
    ),
    "marks of another length": Odd(
        relabelled("a", "b", "c", dtype="string"),
        put(f"obs/{KEY}/mask", np.zeros(11, bool)),
        refused=f"11 marks for 12 values in column '{KEY}'",
    ),
    "no index": Odd(change=drop("obs", "_index"), refused="obs of .* has no index"),
    # Counts that are refused.
    "a fraction": Odd(with_value(0.5), refused="0.5 at cell c2, gene g0 is not a whole number"),
    "a negative count": Odd(with_value(-1), refused="-1.0 at cell c2, gene g0 is negative"),
    "no number": Odd(with_value(np.nan), refused="nan at cell c2, gene g0 is not finite"),
    "infinity": Odd(with_value(np.inf), refused="inf at cell c2, gene g0 is not finite"),
    "a count too large": Odd(
        with_value(2.0**31), refused="2147483648.0 at cell c2, gene g0 is above the largest count"
    ),
    "counts that are text": Odd(
        change=lambda root: put("X/data", np.array(["1"] * root["X/data"].shape[0], object))(root),
        refused="X holds values of type",
    ),
    "indptr too short": Odd(
        change=put("X/indptr", np.array([0, 1])), refused="has 1 row offsets for 12"
    ),
    "values without a gene": Odd(
        change=put("X/data", np.ones(3, "f4")), refused="X has arrays that do not fit together"
    ),
    "another shape": Odd(
        change=lambda root: root["X"].attrs.__setitem__("shape", [12, 5]),
        refused=r"X has shape \(12, 5\) but 12 cells and 6 genes have names",
    ),
    "no such layer": Odd(
        with_layer, layer="count", refused="no layer 'count'; the layers are counts"
    ),
    # What is read.
    "unused categories": Odd(
        assigned(lambda adata: {KEY: pd.Categorical(adata.obs[KEY], ["unused", "c", "b", "a"])})
    ),
    "labels that are text": Odd(change=put(f"obs/{KEY}", NAMES[CODES])),
    "whole numbers": Odd(relabelled(7, 10, 9), labels=("7", "10", "9")),
    "floating-point numbers": Odd(relabelled(0.0, 1.5, 2.0), labels=("0.0", "1.5", "2.0")),
    "truth values": Odd(relabelled(True, False, True), labels=("True", "False", "True")),
    "nullable whole numbers": Odd(relabelled(7, 10, 9, dtype="Int64"), labels=("7", "10", "9")),
    "nullable text": Odd(relabelled("a", "b", "c", dtype="string")),
    "categories that are numbers": Odd(
        assigned(lambda adata: {KEY: pd.Categorical(CODES)}), labels=("0", "1", "2")
    ),
    "names that are nullable text": Odd(
        lambda adata: (
            setattr(adata, "obs_names", adata.obs_names.astype("string")),
            setattr(adata, "var_names", adata.var_names.astype("string")),
        )
    ),
    "columns label and Label": Odd(
        assigned(lambda adata: {"Label": pd.Categorical(["z"] * N_CELLS)})
    ),
    "no column-order": Odd(change=drop("obs", "column-order")),
    "categories and codes by hand": Odd(
        change=several(
            lambda root: [root[f"obs/{KEY}"].attrs.__delitem__(a) for a in ("encoding-type",)],
            put(f"obs/{KEY}/codes", CODES, bare=True),
            put(f"obs/{KEY}/categories", NAMES, bare=True),
        )
    ),
    "bytes by h5py": Odd(
        change=lambda root: (
            root["obs"].__delitem__(KEY),
            root["obs"].create_dataset(KEY, data=NAMES[CODES].astype("S")),
        ),
        h5ad_only="Zarr has text",
    ),
    "anndata 0.7": Odd(change=as_anndata_07),
    "anndata 0.6": Odd(change=as_anndata_06, h5ad_only="a structured array of HDF5"),
    "raw of anndata 0.6": Odd(
        change=raw_of_anndata_06, layer="raw", h5ad_only="a structured array of HDF5"
    ),
    "counts in raw": Odd(normalised, layer="raw"),
    "counts in a layer": Odd(with_layer, layer="counts"),
    "float16": Odd(change=as_type(np.float16)),
    "float16 in csc": Odd(
        formed(sparse.csc_matrix), as_type(np.float16), external="is stored as csc and is read"
    ),
    "float16 in a dense matrix": Odd(
        change=put("X", make_counts().astype(np.float16)), external="is stored as dense and is read"
    ),
    "big-endian floats": Odd(change=as_type(">f4")),
    "big-endian integers": Odd(change=as_type(">i8")),
    "small integers": Odd(change=as_type(np.uint8)),
    "csc": Odd(formed(sparse.csc_matrix), external="is stored as csc and is read by rows"),
    "dense": Odd(formed(lambda x: x.toarray()), external="is stored as dense and is read by rows"),
    "genes in another order": Odd(in_another_order, external="has its genes out of order"),
    "a gene twice in a cell": Odd(with_duplicates, external="holds gene g0 more than once"),
}
"""Every odd input that stands in one file, by name."""

from __future__ import annotations

import json
import subprocess
import sys

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import zarr
from scipy import sparse

from rayvaec.data.inputs.failures import cause_of
from rayvaec.data.inputs.reader import Input, split_layer
from rayvaec.errors import ConfigError, CountsError, FormatError


def read_all(source, elements, scratch):
    """Read all blocks; return the matrix and the blocks' sizes."""
    blocks = list(source.blocks(elements, scratch))
    starts = [start for start, _ in blocks]
    sizes = [x.shape[0] for _, x in blocks]
    assert starts == [0, *np.cumsum(sizes)[:-1]]
    return sparse.vstack([x for _, x in blocks]).toarray(), blocks


@pytest.mark.parametrize("name", ["a.h5ad", "a.zarr", "a.v2.zarr"])
@pytest.mark.parametrize("form", ["csr", "csc", "dense"])
@pytest.mark.parametrize("dtype", ["f4", "f8", "i4", "i8", "u2"])
def test_every_form_is_read_in_blocks(write_input, counts, tmp_path, name, form, dtype):
    path = write_input(counts.astype(dtype), name, form)
    with Input(path) as source:
        assert (source.n_cells, source.n_genes) == counts.shape
        assert source.genes == [f"g{column}" for column in range(12)]
        assert source.names(28, 30) == [f"{path.stem}_28", f"{path.stem}_29"]
        for elements in (1, 25, 10**6):
            x, blocks = read_all(source, elements, tmp_path / f"scratch{elements}")
            np.testing.assert_array_equal(x, counts)
            assert blocks[0][1].dtype == dtype
            assert (len(blocks) == 1) == (elements == 10**6)


def test_blocks_hold_no_more_than_was_asked(write_input, counts, tmp_path):
    with Input(write_input(counts)) as source:
        sizes = [x.nnz for _, x in source.blocks(25, tmp_path)]
        assert max(sizes) <= 25
        assert np.mean(sizes) > 15


def test_a_transposed_matrix_is_read_twice_from_one_scratch_folder(write_input, counts, tmp_path):
    with Input(write_input(counts, form="csc")) as source:
        first, _ = read_all(source, 20, tmp_path / "scratch")
        written = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "scratch").iterdir()}
        assert len(written) > 3
        second, _ = read_all(source, 20, tmp_path / "scratch")
        np.testing.assert_array_equal(first, second)
        assert written == {
            path.name: path.stat().st_mtime_ns for path in (tmp_path / "scratch").iterdir()
        }


@pytest.mark.parametrize("form", ["csr", "csc"])
def test_rows_and_columns_without_values_are_kept(write_input, tmp_path, form):
    x = np.zeros((7, 5), "i4")
    x[2, 3] = 4
    with Input(write_input(x, form=form)) as source:
        np.testing.assert_array_equal(read_all(source, 1, tmp_path / "scratch")[0], x)


@pytest.mark.parametrize("name", ["a.h5ad", "a.zarr"])
def test_layers_and_raw_are_read(write_input, counts, tmp_path, name):
    layers = {"counts": sparse.csr_matrix(counts[:, 3:])}
    path = write_input(counts[:, 3:] * 0.5, name, layers=layers, raw=counts * 2)
    with Input(path) as source:
        assert sorted(source.layers) == ["counts", "raw"]
        assert source.where == f"{path}, X"
    with Input(path, "counts") as source:
        assert source.layers == ["raw"]
        assert source.where == f"{path}, layer counts"
        np.testing.assert_array_equal(read_all(source, 30, tmp_path / "s")[0], counts[:, 3:])
    with Input(path, "raw") as source:
        assert source.n_genes == 12
        assert source.genes[0] == "g0"
        np.testing.assert_array_equal(read_all(source, 30, tmp_path / "s")[0], counts * 2)
    with pytest.raises(CountsError, match=r"has no layer 'count'; the layers are counts, raw"):
        Input(path, "count")


def test_the_choice_without_layers(write_input, counts):
    with pytest.raises(CountsError, match=r"has no layer 'counts'; leave out `layer` to read X"):
        Input(write_input(counts), "counts")


@pytest.mark.parametrize("name", ["a.h5ad", "a.zarr"])
def test_columns_of_every_type_become_codes(write_input, counts, name):
    values = ["u", "v", "u"] * 10
    obs = {
        "text": values,
        "category": pd.Categorical(values, categories=["v", "w", "u"]),
        "number": [2, 10, 2] * 10,
        "truth": [True, False, True] * 10,
        "float": [1.5, np.nan, 1.5] * 10,
        "gaps": pd.Categorical(["u", None, "u"] * 10),
    }
    with Input(write_input(counts, name, obs=obs)) as source:
        assert source.columns == ["cell_type", *obs]
        expected = {
            "text": (("u", "v"), [0, 1, 0]),
            "category": (("v", "w", "u"), [2, 0, 2]),
            "number": (("2", "10"), [0, 1, 0]),
            "truth": (("False", "True"), [1, 0, 1]),
            "float": (("1.5",), [0, -1, 0]),
            "gaps": (("u",), [0, -1, 0]),
        }
        for key, (categories, codes) in expected.items():
            column = source.column(key)
            assert column.categories == categories, key
            assert column.codes.tolist() == codes * 10, key
        with pytest.raises(CountsError, match=r"no obs column 'txt'; the columns are text, "):
            source.column("txt")


def test_names_stored_as_nullable_strings_and_as_numbers_are_read(counts, tmp_path):
    adata = anndata.AnnData(
        counts.astype("f4"),
        pd.DataFrame(index=pd.array([f"c{i}" for i in range(30)], dtype="string")),
        pd.DataFrame(index=[f"g{i}" for i in range(12)]),
    )
    path = tmp_path / "a.h5ad"
    with anndata.settings.override(allow_write_nullable_strings=True):
        adata.write_h5ad(path)
    with Input(path) as source:
        assert source.names(0, 2) == ["c0", "c1"]
    with h5py.File(path, "a") as file:
        del file["obs"][file["obs"].attrs["_index"]]
        file["obs"][file["obs"].attrs["_index"]] = np.arange(30)
    with Input(path) as source:
        assert source.names(9, 11) == ["9", "10"]


def test_paths_that_are_no_anndata_are_refused(tmp_path):
    with pytest.raises(CountsError, match="there is no file .*nothing.h5ad"):
        Input(tmp_path / "nothing.h5ad")
    (tmp_path / "text.h5ad").write_text("cell,gene")
    with pytest.raises(CountsError, match=r"text.h5ad is not an HDF5 file; give an h5ad"):
        Input(tmp_path / "text.h5ad")
    with pytest.raises(CountsError, match="is a folder but not a Zarr group"):
        Input(tmp_path)
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["matrix"] = [1]
    with pytest.raises(CountsError, match="other.h5 has no obs and var"):
        Input(tmp_path / "other.h5")
    zarr.open_group(tmp_path / "store", attributes={"encoding-type": "annbatch-preshuffled"})
    with pytest.raises(CountsError, match="store is a store already"):
        Input(tmp_path / "store")


def test_a_file_without_x_is_refused(counts, tmp_path):
    path = tmp_path / "a.h5ad"
    frame = pd.DataFrame(index=[f"c{i}" for i in range(30)])
    anndata.AnnData(obs=frame, layers={"spliced": counts}).write_h5ad(path)
    with pytest.raises(CountsError, match=r"has no X; use `layer=NAME` \(layers: spliced\)"):
        Input(path)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda file: file["X"]["indptr"].__setitem__(3, 10**6), "its indptr does not fit"),
        (
            lambda file: file["X"]["indices"].__setitem__(0, 12),
            "an index of 12 and the limit is 11",
        ),
        (lambda file: file["X"]["indices"].__setitem__(0, -1), "is damaged: it has an index"),
        (
            lambda file: file["X"].attrs.__setitem__("shape", [29, 12]),
            r"has shape \(29, 12\) but 30",
        ),
        (lambda file: file["X"].attrs.__setitem__("encoding-type", "coo"), "is stored as 'coo'"),
        (lambda file: file["obs"].attrs.__delitem__("_index"), "obs of .* has no index"),
    ],
)
def test_a_damaged_file_is_refused(write_input, counts, tmp_path, change, problem):
    path = write_input(counts)
    with h5py.File(path, "a") as file:
        change(file)
    with pytest.raises(CountsError, match=problem), Input(path) as source:
        list(source.blocks(10**6, tmp_path / "scratch"))


@pytest.mark.parametrize("bad", [30, -1])
def test_a_damaged_transposed_file_is_refused(write_input, counts, tmp_path, bad):
    path = write_input(counts, form="csc")
    with h5py.File(path, "a") as file:
        file["X"]["indices"][0] = bad
    with pytest.raises(CountsError, match="is damaged"), Input(path) as source:
        list(source.blocks(10**6, tmp_path / "scratch"))


def test_a_file_that_is_cut_short_is_refused(write_input, counts, tmp_path):
    path = write_input(counts)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(CountsError, match=r"a.h5ad is damaged or cut short \(.*truncated file"):
        Input(path)
    path.write_bytes(b"")
    with pytest.raises(CountsError, match="a.h5ad is not an HDF5 file"):
        Input(path)


@pytest.mark.parametrize("form", ["csr", "csc", "dense"])
def test_a_damaged_chunk_is_refused(write_input, tmp_path, form):
    rng = np.random.default_rng(0)
    x = rng.integers(1, 2**30, (200, 12)) if form == "dense" else rng.poisson(1.0, (2000, 12))
    path = write_input(x, form=form)
    with h5py.File(path, "a") as file:
        attributes = dict(file["X"].attrs)
        if form == "dense":
            del file["X"]
            file.create_dataset("X", data=x, compression="gzip", chunks=(50, 12))
            file["X"].attrs.update(attributes)
            array = file["X"]
        else:
            values = file["X/data"][:]
            del file["X/data"]
            array = file.create_dataset("X/data", data=values, compression="gzip", chunks=(500,))
        chunk = array.id.get_chunk_info(1)
        offset, size = chunk.byte_offset, chunk.size
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(bytes(size))
    with Input(path) as source, pytest.raises(CountsError, match=r"a.h5ad is damaged or cut short"):
        list(source.blocks(10**4, tmp_path / "scratch"))


def test_a_zarr_folder_with_a_missing_or_damaged_file_is_refused(write_input, counts, tmp_path):
    path = write_input(counts, "a.zarr")
    chunk = next(file for file in (path / "X/data/c").rglob("*") if file.is_file())
    chunk.write_bytes(chunk.read_bytes()[: chunk.stat().st_size // 2])
    with Input(path) as source, pytest.raises(CountsError, match=r"a.zarr is damaged or cut short"):
        list(source.blocks(10**6, tmp_path / "scratch"))


@pytest.mark.parametrize("form", ["csr", "csc", "dense"])
def test_reading_can_begin_at_any_row(write_input, counts, tmp_path, form):
    with Input(write_input(counts, form=form)) as source:
        for start in (0, 1, 13, 29):
            blocks = list(source.blocks(20, tmp_path / "scratch", start))
            assert blocks[0][0] == start
            x = sparse.vstack([x for _, x in blocks]).toarray()
            np.testing.assert_array_equal(x, counts[start:])


def test_ranges_made_for_more_memory_are_made_again(write_input, counts, tmp_path):
    with Input(write_input(counts, form="csc")) as source:
        read_all(source, 25, tmp_path / "scratch")
        first = len(list((tmp_path / "scratch").glob("*.row")))
        x, _ = read_all(source, 3, tmp_path / "scratch")
        np.testing.assert_array_equal(x, counts)
        assert len(list((tmp_path / "scratch").glob("*.row"))) > first


def test_long_columns_of_text_are_read_in_parts(counts, tmp_path, monkeypatch):
    monkeypatch.setattr("rayvaec.data.inputs.reader.NAMES_BLOCK", 7)
    labels = [f"t{row * 7 % 11}" for row in range(30)]
    frame = pd.DataFrame({"cell_type": labels}, index=[f"c{row}" for row in range(30)])
    path = tmp_path / "a.h5ad"
    anndata.AnnData(counts, frame).write_h5ad(path, convert_strings_to_categoricals=False)
    with Input(path) as source:
        column = source.column("cell_type")
    assert column.categories == tuple(sorted(set(labels)))
    assert [column.categories[code] for code in column.codes] == labels


def test_the_file_of_real_counts(shared, tmp_path):
    path = shared / "data" / "pbmc_10x_200.h5ad"
    with Input(path) as source:
        x, blocks = read_all(source, 50_000, tmp_path)
        assert len(blocks) > 5
        np.testing.assert_array_equal(x, anndata.read_h5ad(path).X.toarray())
        assert source.column("cell_type").categories == ("B cell", "Monocyte", "Other", "T cell")


def read_everything(path, tmp_path):
    with Input(path) as source:
        source.column("cell_type")
        list(source.blocks(10**6, tmp_path / "scratch"))


def linked_to_nothing(link):
    def change(path):
        with h5py.File(path, "a") as file:
            del file["obs/cell_type"]
            file["obs/cell_type"] = link

    return change


def with_a_filter(path):
    """Store values by a filter that HDF5 does not bring along."""
    with h5py.File(path, "a") as file:
        n = len(file["X/data"])
        del file["X/data"]
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_chunk((n,))
        plist.set_filter(32013, h5py.h5z.FLAG_OPTIONAL, (3,))
        space = h5py.h5s.create_simple((n,))
        h5py.h5d.create(file["X"].id, b"data", h5py.h5t.NATIVE_FLOAT, space, plist)


def with_a_codec(path):
    """Store values by a codec that nobody has."""
    file = path / "X/data/zarr.json"
    metadata = json.loads(file.read_text())
    metadata["codecs"] = [{"name": "bytes", "configuration": {"endian": "little"}}]
    metadata["codecs"].append({"name": "magic", "configuration": {}})
    file.write_text(json.dumps(metadata))


def with_bytes_for_names(path):
    with h5py.File(path, "a") as file:
        del file["obs/_index"]
        file["obs/_index"] = np.array([b"\xff\xfe"] * 30)


CAUSES = {
    "filter": (
        "a.h5ad",
        with_a_filter,
        "X/data of .* filter zfp, which is not installed; pip",
    ),
    "codec": ("a.zarr", with_a_codec, "by a codec that is not installed .*magic.*; install it"),
    "soft link": (
        *("a.h5ad", linked_to_nothing(h5py.SoftLink("/nothing"))),
        "obs/cell_type of .* is a link to /nothing, which does not exist; put back",
    ),
    "external link": (
        *("a.h5ad", linked_to_nothing(h5py.ExternalLink("nothing.h5", "/x"))),
        "obs/cell_type of .* is a link to nothing.h5, which does not exist; put back",
    ),
}


@pytest.mark.parametrize("name", CAUSES)
def test_what_is_not_damaged_is_not_called_damaged(write_input, counts, tmp_path, name):
    file, change, message = CAUSES[name]
    path = write_input(counts, file)
    change(path)
    with pytest.raises(CountsError, match=message) as caught:
        read_everything(path, tmp_path)
    assert " damaged or cut short" not in caught.value.detail


def test_names_that_are_not_text_are_told(write_input, counts):
    path = write_input(counts)
    with_bytes_for_names(path)
    with Input(path) as source, pytest.raises(FormatError, match="has names that are not UTF-8"):
        source.names(0, 3)


def test_a_file_that_is_open_for_writing_is_told(write_input, counts):
    path = write_input(counts)
    script = f"import h5py; f = h5py.File({str(path)!r}, 'a'); print('open', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as writer:
        assert writer.stdout.readline() == b"open\n"
        with pytest.raises(CountsError, match="is open for writing in another process; close it"):
            Input(path)
    with Input(path) as source:
        assert source.n_cells == 30


def test_a_link_to_no_file_is_told(tmp_path):
    (tmp_path / "a.h5ad").symlink_to(tmp_path / "gone.h5ad")
    with pytest.raises(CountsError, match="a.h5ad is a link to .*gone.h5ad, which does not exist"):
        Input(tmp_path / "a.h5ad")


def test_a_file_that_may_not_be_read_is_told(write_input, counts, monkeypatch):
    path = write_input(counts)

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.open", refuse)  # root may read anything
    with pytest.raises(CountsError, match="a.h5ad may not be read: permission denied; ask its"):
        Input(path)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(24, "Too many open files"), "too many files are open; raise the limit: ulimit"),
        (OSError("unable to open (name = 'a', errno = 13, error message"), "permission denied"),
        (OSError(5, "Input/output error"), "cannot be read .Input/output error.; check the disk"),
        (OSError("truncated file: eof = 9"), "is damaged or cut short .truncated file: eof = 9"),
        (KeyError("nothing"), "is damaged or cut short"),
    ],
)
def test_causes_are_told_apart(error, message):
    cause = cause_of(error, "a.h5ad")
    assert str(cause).startswith("a.h5ad ")
    with pytest.raises(CountsError, match=message):
        raise cause


def test_other_formats_are_named(tmp_path):
    with h5py.File(tmp_path / "a.h5mu", "w") as file:
        file.attrs["encoding-type"] = "MuData"
        for name in ("obs", "var", "mod/rna", "mod/atac"):
            file.create_group(name)
    with pytest.raises(FormatError, match=r"a MuData of the modalities atac, rna; .*atac"):
        Input(tmp_path / "a.h5mu")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_group("matrix")
    with pytest.raises(FormatError, match=r"a.h5 is a 10x file, not an AnnData; .*read_10x_h5"):
        Input(tmp_path / "a.h5")


def test_a_layer_follows_two_colons(tmp_path):
    assert split_layer("a.h5ad", "counts") == (tmp_path.__class__("a.h5ad"), "counts")
    assert split_layer("a.h5ad::raw", "counts") == (tmp_path.__class__("a.h5ad"), "raw")
    assert split_layer("a.h5ad::X", "counts") == (tmp_path.__class__("a.h5ad"), None)
    there = tmp_path / "b::c"
    there.touch()
    assert split_layer(there, None) == (there, None)
    for wrong in ("a.h5ad::", "::raw"):
        with pytest.raises(ConfigError, match=f"the input {wrong} names no file or no layer"):
            split_layer(wrong, None)

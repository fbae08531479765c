from __future__ import annotations

import contextlib
import io
import os
import pickle
import zipfile
from collections import OrderedDict, defaultdict

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rayvaec.errors import ModelError
from rayvaec.model.scvi.unpickle import Inert, read_pickle, read_torch_archive

ARRAYS = [
    np.arange(6).reshape(2, 3),
    np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    np.array(["a", "bcd"]),
    np.array(["a", None, 3, [1, 2]], dtype=object),
    np.array([True, False]),
    np.arange(3, dtype=">i4"),
    np.empty((0, 4), np.float32),
]


def written(tmp_path, pickled, name="attr.pkl"):
    path = tmp_path / name
    path.write_bytes(pickled)
    return path


def archive(path, pickled, members=(), folder="model", compression=zipfile.ZIP_STORED):
    """Write a zip like torch.save's around a pickle."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr(f"{folder}/data.pkl", pickled)
        for name, data in members:
            file.writestr(name, data)
    return path


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: f"{array.dtype}{array.shape}")
def test_arrays_come_back(tmp_path, array, protocol):
    read = read_pickle(written(tmp_path, pickle.dumps({"array": array}, protocol)))["array"]
    np.testing.assert_array_equal(read, array)
    assert read.dtype == array.dtype.newbyteorder("=")


@pytest.mark.parametrize("protocol", [2, 4])
def test_plain_values_come_back(tmp_path, protocol):
    value = {
        "numbers": [1, 2.5, 10**30, True, None],
        "scalars": [np.float32(0.5), np.int64(-3), np.str_("é"), np.bool_(True)],
        "text": ("a", "é", b"\xff", b""),
        "nested": OrderedDict(a={1, 2}, b=slice(0, 3)),
        "default": defaultdict(list, a=[1]),
    }
    assert read_pickle(written(tmp_path, pickle.dumps(value, protocol))) == value


def test_tensors_come_back(tmp_path):
    base = torch.arange(12, dtype=torch.float32)
    tensors = {
        "view": base.view(3, 4).t()[1:],
        "same": base,
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "empty": torch.empty(0, 3),
        "codes": torch.arange(3),
        "flags": torch.tensor([True, False]),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "expanded": torch.ones(1).expand(1, 1),
    }
    torch.save(tensors, tmp_path / "model.pt")
    read = read_torch_archive(tmp_path / "model.pt")
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor), name


def test_tables_are_not_built(tmp_path):
    history = {"elbo": pd.DataFrame({"x": [1.0]}), "when": pd.Index(["a"])}
    read = read_pickle(written(tmp_path, pickle.dumps(history)))
    assert all(isinstance(table, Inert) for table in read.values())


def test_models_of_several_years_are_read(shared):
    data = shared / "data"
    for name, n_weights in (("condscvi_scvi_1_2_2", 16), ("condscvi_scvi_1_4_0", 18)):
        content = read_torch_archive(data / name / "model.pt")
        weights = content["model_state_dict"]
        assert sum(isinstance(weight, torch.Tensor) for weight in weights.values()) == n_weights
        assert content["var_names"].tolist() == [f"gene_{i}" for i in range(100)]
    assert len(read_torch_archive(data / "condscvi_lymph_node/model_params.pt")) == 16
    attributes = read_pickle(data / "condscvi_lymph_node/attr.pkl")
    assert attributes["init_params_"]["non_kwargs"]["dropout_rate"] == 0.1


class Calls:
    """Pickled as a call of a function with arguments."""

    def __init__(self, function, *arguments, state=None):
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.call


def named(module, name, *arguments):
    """A pickle that calls a function by its name, whether it exists or not."""
    pushed = b"".join(pickle.dumps(argument, 0)[:-1] for argument in arguments)
    return b"c" + f"{module}\n{name}\n".encode() + b"(" + pushed + b"tR."


FOREIGN = [
    ("posix", "system"),
    ("os", "system"),
    ("subprocess", "Popen"),
    ("builtins", "eval"),
    ("__builtin__", "exec"),
    ("builtins", "getattr"),
    ("builtins", "__import__"),
    ("builtins", "open"),
    ("builtins", "bytearray"),
    ("torch", "load"),
    ("torch.storage", "_load_from_bytes"),
    ("torch.hub", "load"),
    ("numpy", "load"),
    ("numpy", "fromfile"),
    ("numpy.core.multiarray", "fromfile"),
    ("numpy.testing._private.utils", "runstring"),
    ("collections", "OrderedDict.__init__.__globals__"),
    ("functools", "partial"),
    ("operator", "attrgetter"),
    ("copyreg", "_reconstructor"),
    ("pandasx", "read_pickle"),
    ("rayvaec.model.scvi.unpickle", "Inert"),
]


@pytest.mark.parametrize(("module", "name"), FOREIGN, ids=".".join)
def test_foreign_names_are_refused(tmp_path, module, name):
    touched = tmp_path / "touched"
    pickled = named(module, name, f"touch {touched}")
    path = written(tmp_path, pickled)
    with pytest.raises(ModelError) as error:
        read_pickle(path)
    full = f"{module}.{name}".replace("__builtin__", "builtins")
    assert f"{path} is refused: it names {full}" in str(error.value)
    with pytest.raises(ModelError, match="is refused: it names"):
        read_torch_archive(archive(tmp_path / "model.pt", pickled))
    assert not touched.exists()


def test_a_call_hidden_in_a_table_is_refused(tmp_path):
    touched = tmp_path / "touched"
    hidden = {"history_": Calls(pd.DataFrame, Calls(os.system, f"touch {touched}"))}
    with pytest.raises(ModelError, match=r"attr.pkl is refused: it names posix.system"):
        read_pickle(written(tmp_path, pickle.dumps(hidden)))
    assert not touched.exists()


def test_names_of_pandas_are_not_called(tmp_path):
    inner = written(tmp_path, pickle.dumps(1), "inner.pkl")
    chain = Calls(pd.read_pickle, Calls(pd.io.common.stringify_path, str(inner)))
    assert isinstance(read_pickle(written(tmp_path, pickle.dumps(chain))), Inert)


@pytest.mark.parametrize(
    ("pickled", "found"),
    [
        (b"ctorch._utils\n_rebuild_tensor_v2\n(N}S'_build'\nNstb.", "changes a function"),
        (b"cnumpy\ndtype\n(N}S'fullmatch'\nNstb.", "missing 1 required positional argument"),
        (b"cpandas.core.frame\nDataFrame\n(N}S'x'\nNstb.", "missing 1 required positional"),
        (named("builtins", "bytes", 10**13), "takes 0 positional arguments"),
        (b"Nr\xff\xff\xff\xff.", "a memo of 4294967295 entries"),
        (b"Np99999999999\n.", "a memo of 99999999999 entries"),
        (named("numpy", "dtype", "V8"), "an array of dtype 'V8'"),
        (named("numpy", "dtype", "i4,O"), "an array of dtype 'i4,O'"),
        (named("_codecs", "encode", "a", "zlib"), "bytes in the encoding 'zlib'"),
        (b"I5\nQ.", "cannot unpack non-iterable int object"),
        (b"", "pickle exhausted before seeing STOP"),
        (b"not a pickle", "at position 0, opcode b'n' unknown"),
    ],
)
def test_crooked_pickles_are_refused(tmp_path, pickled, found):
    with pytest.raises(ModelError) as error:
        read_pickle(written(tmp_path, pickled))
    assert found in str(error.value)
    assert "attr.pkl is" in str(error.value)


@pytest.mark.parametrize(
    "state",
    [
        (1, (3,), np.dtype("i8"), False, b"\0" * 16),
        (1, (2,), np.dtype("O"), False, b"\0" * 16),
        (1, (2,), np.dtype("O"), False, [None]),
        (1, (-1, -2), np.dtype("i8"), False, b"\0" * 16),
        (1, (2**40,), np.dtype("U1"), False, b""),
    ],
)
def test_an_array_without_its_data_is_refused(tmp_path, state):
    build = np.empty(0).__reduce__()[0]
    pickled = pickle.dumps(Calls(build, np.ndarray, (0,), b"b", state=state))
    with pytest.raises(ModelError, match="attr.pkl is no pickle, or damaged"):
        read_pickle(written(tmp_path, pickled))


STORAGE = object()


def tensor_pickle(size, stride=None, offset=0, kind="storage", key="0"):
    """A pickle of one tensor, as torch.save writes it."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return (kind, torch.FloatStorage, key, "cpu", 4) if value is STORAGE else None

    stride = stride or torch.empty(size, device="meta").stride()
    rebuild = torch._utils._rebuild_tensor_v2
    file = io.BytesIO()
    Pickler(file, 2).dump(Calls(rebuild, STORAGE, offset, size, stride, False, OrderedDict()))
    return file.getvalue()


FOUR = [("model/data/0", np.arange(4, dtype="<f4").tobytes())]


def test_a_tensor_written_by_hand_is_read(tmp_path):
    """The next test's cases differ from this one in one thing each."""
    path = archive(tmp_path / "model.pt", tensor_pickle((2, 2)), FOUR)
    assert torch.equal(read_torch_archive(path), torch.arange(4.0).view(2, 2))


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ({"size": (5,)}, "a tensor of size (5,) in a storage of 4"),
        ({"size": (2,), "stride": (4,)}, "a tensor of size (2,) in a storage of 4"),
        ({"size": (4,), "offset": 1}, "a tensor of size (4,) in a storage of 4"),
        ({"size": (10**12,), "stride": (0,)}, "a tensor of size (1000000000000,) in a storage"),
        ({"size": (1,), "offset": -1}, "a tensor of size (1,)"),
        ({"size": (1,), "stride": (-1,)}, "a tensor of size (1,)"),
        ({"size": (4,), "key": "../../etc"}, "no item named 'model/data/../../etc'"),
        ({"size": (4,), "kind": "module"}, "it refers to something outside itself, ('module'"),
    ],
)
def test_a_tensor_beyond_its_storage_is_refused(tmp_path, arguments, found):
    path = archive(tmp_path / "model.pt", tensor_pickle(**arguments), FOUR)
    with pytest.raises(ModelError) as error:
        read_torch_archive(path)
    assert str(path) in str(error.value)
    assert found in str(error.value)


def test_a_pickle_has_no_tensors(tmp_path):
    with pytest.raises(ModelError, match="refers to a tensor of another file"):
        read_pickle(written(tmp_path, tensor_pickle((4,))))


def test_archives_that_torch_does_not_write_are_refused(tmp_path):
    path, none = tmp_path / "model.pt", pickle.dumps(None, 2)
    for make, found in (
        (lambda: path.write_bytes(b"PK"), "File is not a zip file"),
        (lambda: archive(path, none, folder="a/.."), "0 members data.pkl"),
        (lambda: archive(path, none, [("b/data.pkl", none)]), "2 members data.pkl"),
        (lambda: archive(path, none, [("model/byteorder", "big")]), "byte order is b'big'"),
        (lambda: archive(path, none, compression=zipfile.ZIP_DEFLATED), "data.pkl is compressed"),
    ):
        make()
        with pytest.raises(ModelError, match=r"model.pt is no file of torch.save") as error:
            read_torch_archive(path)
        assert found in str(error.value)
    with pytest.raises(ModelError, match=r"there is no file .*nowhere.pt"):
        read_torch_archive(tmp_path / "nowhere.pt")


def test_a_truncated_archive_is_refused(tmp_path):
    torch.save({"a": torch.ones(3)}, tmp_path / "model.pt")
    whole = (tmp_path / "model.pt").read_bytes()
    for size in range(0, len(whole), 37):
        (tmp_path / "model.pt").write_bytes(whole[:size])
        with pytest.raises(ModelError, match=r"model.pt is no file of torch.save"):
            read_torch_archive(tmp_path / "model.pt")


MODEL_LIKE = {
    "init_params_": {"kwargs": {"ct_weight": np.arange(3.0)}, "non_kwargs": {"n_hidden": 128}},
    "history_": {"elbo": pd.DataFrame({"x": [1.0]}), "kl": [np.float64(1.5), 2.0]},
    "mapping": np.array(["B cells", "T cells"], dtype=object),
    "names": np.array(["a", "b"]),
    "big": 10**20,
    "nested": OrderedDict(a=({1, 2}, b"bytes", slice(0, 1))),
}


@st.composite
def mutations(draw):
    """Changes of a file: bytes put at places, given as shares of its length, and a cut."""
    places = st.floats(0, 1, exclude_max=True)
    edits = draw(st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=4))
    return edits, draw(st.none() | places)


def mutated(whole, edits, cut):
    data = bytearray(whole)
    for place, value in edits:
        data[int(place * len(data))] = value
    return bytes(data if cut is None else data[: int(cut * len(data))])


def survives(path, data, read=read_pickle):
    path.write_bytes(data)
    with contextlib.suppress(ModelError):
        read(path)


FUZZ = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


@pytest.mark.parametrize("protocol", [2, 4])
def test_mutated_pickles_raise_model_errors_alone(tmp_path, protocol):
    whole = pickle.dumps(MODEL_LIKE, protocol)

    @settings(FUZZ, max_examples=300)
    @given(mutations())
    def check(mutation):
        survives(tmp_path / "attr.pkl", mutated(whole, *mutation))

    check()
    np.testing.assert_array_equal(
        read_pickle(written(tmp_path, whole))["mapping"], MODEL_LIKE["mapping"]
    )


def test_mutations_of_a_real_file_raise_model_errors_alone(tmp_path, shared):
    whole = (shared / "data/condscvi_lymph_node/attr.pkl").read_bytes()
    # The arrays of numbers at its end would hide most mutations.
    head = whole[: whole.index(b"test_indices_")]

    @settings(FUZZ, max_examples=60)
    @given(mutations())
    def check(mutation):
        survives(tmp_path / "attr.pkl", mutated(head, *mutation) + whole[len(head) :])

    check()


@settings(FUZZ, max_examples=300)
@given(st.data())
def test_mutated_archives_raise_model_errors_alone(tmp_path, data):
    path = tmp_path / "model.pt"
    torch.save({"weights": {"a": torch.ones(2, 3)}, "genes": MODEL_LIKE["mapping"]}, path)
    whole = path.read_bytes()
    survives(path, mutated(whole, *data.draw(mutations())), read_torch_archive)

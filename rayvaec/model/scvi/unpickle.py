"""Restricted unpickler: tensors, arrays and plain values, no code execution.

A pickle is a program: it names functions, calls them and sets attributes of what it finds. Here a
name stands for one of the few builders below, which check their arguments and cannot be changed
from within; or, for objects that no model needs, for `Inert`, which swallows everything. Any other
name is refused.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from rayvaec.errors import ModelError


class _RefusedError(Exception):
    """Something that no saved model holds: foreign code, or bytes that pose as a model."""


class Inert:
    """What stands for an object that is not built, such as a pandas table."""

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _Builder:
    """A function that a pickle can call and, unlike a plain function, set no attributes of."""

    def __init__(self, build: Callable[..., Any]) -> None:
        self._build = build

    def __call__(self, *arguments: Any) -> Any:
        return self._build(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise _RefusedError("it changes a function that it names")


def _tensor(storage: Tensor, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    size, stride = tuple(size), tuple(stride)
    if len(size) != len(stride) or min((offset, *size, *stride)) < 0:
        raise ValueError(f"a tensor of size {size} and stride {stride}")
    last = sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    inside = offset + last < storage.numel() and math.prod(size) <= storage.numel()
    if math.prod(size) and not inside:
        raise ValueError(f"a tensor of size {size} in a storage of {storage.numel()}")
    return storage.as_strided(size, stride, offset).clone()


_PLAIN_DTYPE = re.compile(r"[<>|=]?(\?|b1|[iuf][1248]|O8?|[US]\d{1,4})")


class _DType:
    """A dtype of plain values. numpy's own could be given a state that reads arbitrary memory."""

    def __init__(self, code: str, *_: Any) -> None:
        if not _PLAIN_DTYPE.fullmatch(code):
            raise ValueError(f"an array of dtype {code[:20]!r}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray):
    """An array whose pickled state is checked before numpy sees it."""

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        of_objects = dtype.dtype.hasobject
        expected = math.prod(shape) * (1 if of_objects else dtype.dtype.itemsize)
        if type(data) is not (list if of_objects else bytes) or len(data) != expected:
            raise ValueError(f"an array of shape {shape} without the data for it")
        checked: Any = (1, shape, dtype.dtype, bool(fortran), data)
        super().__setstate__(checked)


def _new_array(*_: Any) -> np.ndarray:
    return np.empty(0).view(_Array)


def _scalar(dtype: _DType, data: Any) -> Any:
    return data if dtype.dtype.hasobject else np.frombuffer(data, dtype.dtype)[0].item()


def _encoded(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise ValueError(f"bytes in the encoding {encoding!r}")
    return text.encode("latin1")


_BUILDERS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor_v2": _tensor,
    # Every dict is a plain one: a defaultdict would keep a function to call.
    "collections.OrderedDict": OrderedDict,
    "collections.defaultdict": lambda *_: {},
    "builtins.dict": dict,
    "builtins.list": list,
    "builtins.set": set,
    "builtins.slice": slice,
    # Pickles make empty bytes this way; an argument could ask for any amount of memory.
    "builtins.bytes": lambda: b"",
    "_codecs.encode": _encoded,
    "numpy.core.multiarray._reconstruct": _new_array,
    "numpy._core.multiarray._reconstruct": _new_array,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
}

_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
}


class _Unpickler(pickle.Unpickler):
    """Resolves names and storages; holds no state that a pickle could reach."""

    NAMES: ClassVar[dict[str, Any]] = {
        **{name: _Builder(build) for name, build in _BUILDERS.items()},
        **{f"torch.{name}": dtype for name, dtype in _STORAGES.items()},
        "numpy.dtype": _DType,
        "numpy.ndarray": Inert,
    }
    INERT = re.compile(r"(pandas|pyarrow|anndata|scipy\.sparse)\..+")

    def __init__(self, pickled: bytes, storages: Callable[[str, torch.dtype], Tensor]) -> None:
        super().__init__(io.BytesIO(pickled))
        self._storages = storages

    def find_class(self, module: str, name: str) -> Any:
        full = f"{'builtins' if module == '__builtin__' else module}.{name}"
        if full in self.NAMES:
            return self.NAMES[full]
        if self.INERT.fullmatch(full):
            return Inert
        raise _RefusedError(f"it names {full[:80]}, which no saved model needs")

    def persistent_load(self, saved_id: Any) -> Tensor:
        kind, dtype, key, *_ = saved_id
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise _RefusedError(f"it refers to something outside itself, {str(saved_id)[:80]}")
        return self._storages(key, dtype)


def read_torch_archive(path: Path) -> Any:
    """Read what `torch.save` wrote.

    Parameters
    ----------
    path : Path
        A zip archive of torch 1.6 or later.

    Returns
    -------
    object
        Tensors, arrays, dicts, lists and plain values; other objects are `Inert`.

    Raises
    ------
    ModelError
        If the file is no such archive, is damaged, or names foreign code.
    """
    return _read(path, _load_archive, "file of torch.save")


def read_pickle(path: Path) -> Any:
    """Read a plain pickle; result and errors as in `read_torch_archive`."""
    return _read(path, lambda path: _load(path.read_bytes(), _no_storage), "pickle")


def _read(path: Path, load: Callable[[Path], Any], what: str) -> Any:
    try:
        return load(path)
    except FileNotFoundError as error:
        raise ModelError(f"there is no file {path}", "give the folder that was saved") from error
    except _RefusedError as error:
        raise ModelError(f"{path} is refused: {error}", "do not trust this file") from error
    # Bytes that are not what they should be raise whatever the code that meets them raises.
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ModelError(
            f"{path} is no {what}, or damaged: {reason}", "copy or save it again"
        ) from error


def _load(pickled: bytes, storages: Callable[[str, torch.dtype], Tensor]) -> Any:
    # The memo is an array as long as its largest index, which four bytes can set to billions.
    for opcode, argument, _ in pickletools.genops(pickled):
        if "PUT" in opcode.name and (argument or 0) > len(pickled):
            raise ValueError(f"a memo of {argument} entries")
    return _Unpickler(pickled, storages).load()


def _no_storage(key: str, dtype: torch.dtype) -> Tensor:
    raise _RefusedError("it refers to a tensor of another file")


def _load_archive(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        pickles = [name for name in archive.namelist() if re.fullmatch(r"[^/]+/data\.pkl", name)]
        if len(pickles) != 1:
            raise ValueError(f"it has {len(pickles)} members data.pkl instead of one")
        folder = pickles[0].removesuffix("data.pkl")
        if f"{folder}byteorder" in archive.namelist():
            order = _member(archive, f"{folder}byteorder")
            if order != b"little":
                raise ValueError(f"its byte order is {order[:20]!r}")

        def storage(key: str, dtype: torch.dtype) -> Tensor:
            data = bytearray(_member(archive, f"{folder}data/{key}"))
            return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)

        return _load(_member(archive, pickles[0]), storage)


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    # torch.save does not compress; a compressed member could unfold to any size.
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"its member {name[:80]} is compressed")
    return archive.read(name)

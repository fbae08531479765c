"""Every public function of `rayvaec.inference` that computes with a model, found and called.

Arguments are given by name or type. A new function that needs something else fails its tests with
the name of what `World` has to give it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from itertools import count
from pathlib import Path
from pkgutil import walk_packages
from typing import Any

import anndata
import numpy as np
import pandas as pd
import torch
from scipy.sparse import csr_matrix
from small_cells import N_GENES, N_LABELS, make_cells, make_module
from torch import Tensor

import rayvaec.inference
from rayvaec.data.registry import Registry
from rayvaec.data.store.store import Rows
from rayvaec.inference import posterior
from rayvaec.inference.analyses.contrasts import Contrast
from rayvaec.inference.analyses.differential import Comparison
from rayvaec.inference.analyses.group_stats import Populations, pooled, summarise
from rayvaec.inference.analyses.normalized_expression import Wanted
from rayvaec.inference.ppc.accumulator import Tally, panel_of
from rayvaec.inference.trained_model import TrainedModel
from rayvaec.model.inputs import CellTensors
from rayvaec.model.saved import SavedModel
from rayvaec.model.vaec import VAEC

FEWER = {"n_samples": 3, "n_mc_samples": 20, "n_samples_overall": 16}
"""Numbers of draws, which are large by default."""

FORMS = {
    "softplus": {},
    "softplus-batches": {"n_batch": 2, "encode_covariates": True},
    "softmax": {"generative": "softmax", "n_batch": 1},
    "softmax-batches": {"generative": "softmax", "n_batch": 2, "encode_covariates": True},
    "mog": {"generative": "softmax", "n_batch": 2, "prior": "mog", "n_fine_labels": 3},
}
N_CELLS = 70  # one whole block of rows and one that is not
GENES = tuple(f"g{gene}" for gene in range(N_GENES))
LABELS = tuple(f"l{label}" for label in range(N_LABELS))


class World:
    """A model, cells for it, and whatever else functions take.

    Parameters
    ----------
    folder : Path
        For what is written.
    form : str
        Which of `FORMS`.
    """

    def __init__(self, folder: Path, form: str) -> None:
        self.folder, self._numbers = folder, count()
        self.module: VAEC = make_module(**FORMS[form])
        self.has_batches = self.module.config.n_batch > 1
        self.cells = make_cells(N_CELLS, np.arange(N_CELLS) % 2 if self.has_batches else None)

    @cached_property
    def registry(self) -> Registry:
        batches = (("b0", "b1"), "batch") if self.has_batches else ((), None)
        return Registry(GENES, LABELS, "label", *batches)

    @property
    def model(self) -> TrainedModel:
        names = {**self.registry.to_json(), "fine_labels": ["f0", "f1", "unknown"]}
        return TrainedModel(SavedModel(self.module, names, {}, "0" * 64))

    @property
    def adata(self) -> anndata.AnnData:
        cells = self.cells
        x = csr_matrix((cells.counts, cells.indices, cells.indptr), shape=(N_CELLS, N_GENES))
        obs = {"label": np.array(LABELS)[cells.labels]}
        if cells.batches is not None:
            obs["batch"] = np.array(("b0", "b1"))[cells.batches]
        index = [f"cell{i}" for i in range(N_CELLS)]
        return anndata.AnnData(
            x.astype(np.float32), pd.DataFrame(obs, index), pd.DataFrame(index=list(GENES))
        )

    @property
    def tensors(self) -> CellTensors:
        return CellTensors.of(self.cells, N_GENES, self.module.px_r.device)

    @property
    def populations(self) -> Populations:
        return summarise(self.module, self.cells, self.cells.labels, N_LABELS, 8, 0)

    @property
    def _panel(self) -> Any:
        return panel_of(dict.fromkeys(GENES, 5), GENES, N_LABELS, 50.0)

    @property
    def _rows(self) -> Rows:
        cells = self.cells
        batches = cells.batches
        if batches is None:
            batches = np.zeros(N_CELLS, np.int64)
        return Rows(cells.indptr, cells.indices, cells.counts, cells.labels, batches)

    def argument(self, name: str, annotation: str) -> Any:
        """Return what a parameter of a function wants."""
        device = self.module.px_r.device
        by_type: dict[str, Callable[[], Any]] = {
            "VAEC": lambda: self.module,
            "AnnData": lambda: self.adata,
            "Wanted": lambda: Wanted(n_samples=2, seed=1, average=False),
            "Comparison": lambda: Comparison(n_samples=8),
            "Block": lambda: next(posterior.blocks(self.module, self.cells)),
            "Panel": lambda: self._panel,
            "Tally": lambda: Tally.empty(N_GENES, N_LABELS, 5, self._panel),
            "Path": lambda: self.folder / f"out{next(self._numbers)}",
            "Rows": lambda: self._rows,
            "Sequence[Contrast]": lambda: [Contrast(0, None), Contrast(0, 1)],
            "tuple[Contrast, ...]": lambda: (Contrast(0, None), Contrast(0, 1)),
            "tuple[int, ...]": lambda: (0, 1, 2),
        }
        by_name: dict[str, Callable[[], Any]] = {
            "cells": lambda: self.cells,
            "labels": lambda: self.cells.labels,
            "keys": lambda: self.cells.keys,
            "library": lambda: np.full(len(self.cells), 40, np.float32),
            "groups": lambda: self.cells.labels,
            "n_groups": lambda: N_LABELS,
            "n_labels": lambda: N_LABELS,
            "keep": lambda: 8,
            "seed": lambda: 1,
            "p": lambda: 2,
            "reduce": lambda: ("mean", "var", "zero_fraction"),
            "by_batch": lambda: False,
            "genes": lambda: slice(0, 9) if annotation == "slice" else GENES,
            "names": lambda: LABELS,
            "populations": lambda: self.populations,
            "one": lambda: pooled(self.populations, [0], 8),
            "two": lambda: pooled(self.populations, [1, 2], 8),
            "z": lambda: torch.zeros(len(self.cells), 5, device=device),
            "y": lambda: self.tensors.y,
            "batch_index": lambda: self.tensors.batch_index,
        }
        make = by_type.get(annotation) or by_name.get(name)
        assert make is not None, f"World gives nothing for {name}: {annotation}"
        return make()

    def called(self, function: Callable[..., Any], **given: Any) -> Any:
        """Call a function with the arguments that it demands, and go through what it yields."""
        parameters = inspect.signature(function).parameters
        if "batches" in parameters and self.has_batches:
            given["batches"] = self.cells.batches
        if "block" in parameters:
            given["keys"] = self.cells.keys[: posterior.BLOCK_ROWS]
        for name, parameter in parameters.items():
            demanded = parameter.default is parameter.empty
            if name in FEWER:
                given[name] = FEWER[name]
            elif demanded and parameter.kind is not parameter.VAR_KEYWORD and name not in given:
                given[name] = self.argument(name, parameter.annotation)
        result = function(**given)
        return list(result) if isinstance(result, Iterator) else result


@dataclass(frozen=True)
class Case:
    """A public function or method.

    Parameters
    ----------
    name : str
    owner : type, optional
        Whose method it is.
    function : callable
    """

    name: str
    owner: type | None
    function: Callable[..., Any]

    def run(self, world: World) -> Any:
        """Call it."""
        if self.owner is None:
            return world.called(self.function)
        if issubclass(self.owner, TrainedModel):
            return world.called(self.function.__get__(world.model))
        instance = world.called(self.owner)
        given = {}
        if "parts" in inspect.signature(self.function).parameters:
            given["parts"] = iter([world.called(instance.part)])
        return world.called(self.function.__get__(instance), **given)


def cases() -> list[Case]:
    """Return every public function of `rayvaec.inference` that is given a model or is a model's."""
    found = []
    for _, name, _ in walk_packages(rayvaec.inference.__path__, "rayvaec.inference."):
        for member in vars(import_module(name)).values():
            if getattr(member, "__module__", None) != name or member.__name__.startswith("_"):
                continue
            if inspect.isfunction(member) and _computes(member):
                found.append(Case(f"{name}.{member.__name__}", None, member))
            elif inspect.isclass(member) and not inspect.isabstract(member):
                found.extend(_methods(name, member))
    return found


def _methods(module: str, owner: type) -> list[Case]:
    if getattr(owner, "_is_protocol", False):
        return []
    is_wanted = _is_analysis if issubclass(owner, TrainedModel) else _computes
    with_module = _computes(owner.__init__)
    return [
        Case(f"{module}.{owner.__name__}.{name}", owner, method)
        for name, method in inspect.getmembers(owner, inspect.isfunction)
        if not name.startswith("_") and (with_module or is_wanted(method))
    ]


def _computes(function: Any) -> bool:
    return "VAEC" in [p.annotation for p in inspect.signature(function).parameters.values()]


def _is_analysis(method: Any) -> bool:
    return "adata" in inspect.signature(method).parameters and method.__name__ != "cells"


def outline(value: Any) -> Any:
    """Return the shapes and types of a result, whatever the numbers in it."""
    if isinstance(value, Tensor):
        return tuple(value.shape), str(value.dtype)
    if isinstance(value, pd.DataFrame):
        return value.shape, sorted(value.columns)
    if hasattr(value, "indptr"):  # how many entries there are depends on the numbers
        return len(value.indptr), str(value.indices.dtype)
    if type(value).__name__ == "SampleMajor":
        return value.lengths.shape
    if isinstance(value, np.ndarray):
        return value.shape, str(value.dtype)
    if isinstance(value, dict):
        return {key: outline(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [outline(item) for item in value]
    if type(value).__name__ == "Block":
        return outline([value.x.indptr, value.y, value.batch_index, value.qz.loc, value.qz.scale])
    return type(value).__name__

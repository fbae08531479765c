"""Summary of a model's training data, to compare draws with.

They stand in ``summary.safetensors`` of the saved-model folder. Models whose training data nobody
has seen here, those of scvi-tools and of rayvaec before it had this file, have none. It is no
part of the model's identity.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from rayvaec.errors import ModelError
from rayvaec.util.atomic import whole_output

SUMMARY = "summary.safetensors"
COUNT_EDGES = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256, 512)
"""Where the bins of a gene's counts begin; the last has no end."""
N_QUANTILES = 101
MOST_CELLS = 2**16 - 1
"""Most cells of a summary: its histograms count in 16 bits, which bounds the file."""
_DTYPES = {"cells": np.int64, "library": np.float32, "mean": np.float32, "histogram": np.uint16}


@dataclass(frozen=True)
class TrainingSummary:
    """A random sample of training cells, in numbers.

    Parameters
    ----------
    cells : NDArray[n_labels] of int64
        Cells of each label in the sample.
    library : NDArray[n_labels, N_QUANTILES] of float32
        Quantiles of the cells' total counts, from the least to the largest; 0 without cells.
    mean : NDArray[n_genes, n_labels] of float32
        Mean count; 0 without cells.
    histogram : NDArray[n_genes, n_labels, len(COUNT_EDGES)] of uint16
        How many cells have how many counts.
    """

    cells: NDArray[np.int64]
    library: NDArray[np.float32]
    mean: NDArray[np.float32]
    histogram: NDArray[np.uint16]

    @property
    def zero_fraction(self) -> NDArray[np.float64]:
        """Share of cells without a count, [n_genes, n_labels]; 1 without cells."""
        zeros = self.histogram[..., 0] / np.maximum(self.cells, 1)
        return np.where(self.cells > 0, zeros, 1.0)

    def telling_genes(self, n: int) -> list[int]:
        """Return the genes that differ most between labels.

        Parameters
        ----------
        n : int
            How many, at most.

        Returns
        -------
        list of int
            Positions of genes; the one comes first whose log(1 + mean) varies most over the labels
            that have cells, or which has most counts where there is only one.
        """
        levels = np.log1p(self.mean[:, self.cells > 0])
        spread = levels.std(axis=1) if levels.shape[1] > 1 else levels.sum(axis=1)
        return np.argsort(-spread, kind="stable")[:n].tolist()

    def save(self, model: Path) -> None:
        """Write the file into a model's folder, whole or not at all, over an older one.

        Parameters
        ----------
        model : Path
            A folder that `rayvaec.model.saved.save_model` wrote.
        """
        with whole_output(model / SUMMARY, overwrite=True) as partial:
            partial.write_bytes(save(asdict(self)))


def read_summary(model: Path, n_genes: int, n_labels: int) -> TrainingSummary | None:
    """Read the summary of a model's training data.

    Parameters
    ----------
    model : Path
        The model folder.
    n_genes, n_labels : int
        Sizes of the model.

    Returns
    -------
    TrainingSummary or None
        None where the folder has none.

    Raises
    ------
    ModelError
        If the file is damaged or is another model's.
    """
    path = model / SUMMARY
    if not path.is_file():
        return None
    fix = "copy the model folder again, or remove that file: a model works without"
    try:
        with safe_open(path, framework="numpy") as file:
            arrays: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ModelError(f"{path} is damaged ({error})", fix) from error
    shapes = {
        "cells": (n_labels,),
        "library": (n_labels, N_QUANTILES),
        "mean": (n_genes, n_labels),
        "histogram": (n_genes, n_labels, len(COUNT_EDGES)),
    }
    found = {name: (value.shape, value.dtype) for name, value in arrays.items()}
    wanted = {name: (shape, np.dtype(_DTYPES[name])) for name, shape in shapes.items()}
    if found != wanted:
        raise ModelError(
            f"{path} is no summary of {n_genes} genes and {n_labels} labels, as the model has", fix
        )
    return TrainingSummary(**arrays)

"""Input of the dense VAEC methods: what is refused, and how it is said."""

from __future__ import annotations

import torch
from torch import Tensor

from rayvaec.errors import CountsError


def check_counts(x: Tensor, n_input: int) -> None:
    """Refuse a matrix that is not raw counts of the model's genes.

    Parameters
    ----------
    x : Tensor[n_cells, n_input]
    n_input : int
        Genes of the model.

    Raises
    ------
    CountsError
        If the shape is another, or a value is negative, not whole or not finite.
    """
    if x.dim() != 2 or x.shape[1] != n_input:
        raise CountsError(
            f"X has shape {tuple(x.shape)}",
            f"give (n_cells, {n_input}), the genes this model was built for",
        )
    wrong = ~((x >= 0) & (x == torch.floor(x)) & torch.isfinite(x))
    if wrong.any():
        cell, gene = (int(i) for i in wrong.nonzero()[0])
        raise CountsError(
            f"X[{cell}, {gene}] = {float(x[cell, gene]):g} is not a count", "give raw counts"
        )


def check_codes(name: str, codes: Tensor | None, n_categories: int, n_cells: int) -> None:
    """Refuse label or batch codes that the model does not have.

    Parameters
    ----------
    name : str
        What the codes are, for the message.
    codes : Tensor[n_cells, 1], optional
    n_categories : int
        Categories of the model; codes of none are ignored, and of one may be left out.
    n_cells : int
        Cells that the codes are for.

    Raises
    ------
    CountsError
        If codes are missing where they are needed, one-hot, too few or out of range.
    """
    if n_categories == 0 or (n_categories == 1 and codes is None):
        return
    if codes is None:
        raise CountsError(
            f"this model was trained on {n_categories} categories of {name} and no code was given",
            f"add a tensor {name!r} of shape (n_cells, 1)",
        )
    if codes.dim() > 1 and codes.shape[1] != 1:
        one_hot = codes.shape[1] == n_categories
        raise CountsError(
            f"{name} has shape {tuple(codes.shape)}{', which looks one-hot' if one_hot else ''}",
            "give one code a cell, of shape (n_cells, 1)"
            + (f": {name}.argmax(1, keepdim=True)" if one_hot else ""),
        )
    if len(codes) != n_cells:
        raise CountsError(f"{name} has {len(codes)} codes for {n_cells} cells", "give one a cell")
    outside = (codes < 0) | (codes >= n_categories)
    if outside.any():
        raise CountsError(
            f"{name} holds the code {int(codes[outside][0])}",
            f"give codes from 0 to {n_categories - 1}",
        )

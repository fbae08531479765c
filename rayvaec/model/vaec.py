"""VAEC: label-conditional variational autoencoder for single-cell counts.

The module of scvi-tools' CondSCVI (Lopez et al. 2022, DestVI, Nature Biotechnology, Methods:
"single-cell latent variable model")::

    z ~ N(0, I)                                            per cell
    h = decoder(z, y)                                      y: the cell's label
    softplus form (scvi-tools 0.16 to 1.4.0), the default:
        px_scale = softplus(W h + b)                       per gene
        x ~ NB(total_count=library * px_scale, logits=px_r)
    softmax form (1.4.1 on):
        px_scale = softmax(W h + b + per_ct_bias[y])
        x ~ NB(mean=library * px_scale, inverse dispersion=exp(px_r))

State-dict keys are scvi-tools' own, so that weights move between the two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rayvaec.errors import CountsError
from rayvaec.model.config import VAECConfig
from rayvaec.model.draws import draw_posterior
from rayvaec.model.losses import LossOutput, LossRecorder, classification_loss
from rayvaec.model.precision import working_precision
from rayvaec.model.sparse import SparseVAEC


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


__all__ = ["VAEC", "LossOutput", "LossRecorder"]


class VAEC(SparseVAEC):
    """Label-conditional VAE for counts.

    Parameters
    ----------
    n_input : int
        Number of genes.
    n_labels : int
        Number of labels; 0 or 1 means that labels carry no information.
    n_hidden, n_latent, n_layers : int
        Width of hidden layers, dimensions of z, number of hidden layers.
    log_variational : bool
        Whether the encoder reads log(1 + x).
    ct_weight : Sequence[float], optional
        Weight of each label's cells in the loss.
    dropout_rate : float
        Dropout of encoder and decoder.
    **module_kwargs
        Further arguments of `VAECConfig`: ``generative``, ``library``, ``n_batch``,
        ``encode_covariates``, ``prior``, ``num_classes_mog``, ``n_fine_labels``.

    Raises
    ------
    ConfigError
        If an argument is unknown or out of range.
    """

    def __init__(
        self,
        n_input: int,
        n_labels: int = 0,
        n_hidden: int = 128,
        n_latent: int = 5,
        n_layers: int = 2,
        log_variational: bool = True,
        ct_weight: Sequence[float] | NDArray[np.floating] | None = None,
        dropout_rate: float = 0.05,
        **module_kwargs: Any,
    ) -> None:
        config = VAECConfig.from_json(
            {
                "n_input": n_input,
                "n_labels": n_labels,
                "n_hidden": n_hidden,
                "n_latent": n_latent,
                "n_layers": n_layers,
                "log_variational": log_variational,
                "ct_weight": ct_weight,
                "dropout_rate": dropout_rate,
                **module_kwargs,
            }
        )
        super().__init__(config)

    @working_precision
    def inference(
        self, x: Tensor, y: Tensor, n_samples: int = 1, *, batch_index: Tensor | None = None
    ) -> dict[str, Any]:
        """Encode cells and draw z from the posterior.

        Parameters
        ----------
        x : Tensor[n_cells, n_input], raw counts
        y : Tensor[n_cells, 1], label codes
        n_samples : int
            Draws of z a cell; more than one adds a leading dimension.
        batch_index : Tensor[n_cells, 1], optional
            Batch codes, in models with batches.

        Returns
        -------
        dict
            ``z`` (Tensor[(n_samples,) n_cells, n_latent]), ``qz`` (Normal) and ``library``
            (Tensor[(n_samples,) n_cells, 1], as in `library_of`).

        Raises
        ------
        CountsError
            If `x` is not a matrix of counts, of another width, or a code is out of range.
        """
        self._check_codes(y, batch_index, len(x))
        check_counts(x, self.config.n_input)
        x = x.to(self.px_r.dtype)
        encoded = torch.log1p(x) if self.config.log_variational else x
        beside = self._encoded_batch(y, batch_index)
        if beside is not None:
            encoded = torch.cat((encoded, beside), dim=1)
        qz = self.z_encoder(encoded, *self._encoder_categories(y, batch_index))
        library = self.library_of(x.sum(1, keepdim=True))
        if n_samples > 1:
            z = qz.rsample(torch.Size((n_samples,)))
            library = library.expand(n_samples, -1, -1)
        else:
            z = qz.rsample()
        return {"z": z, "qz": qz, "library": library}

    @working_precision
    def generative(
        self,
        z: Tensor,
        library: Tensor,
        y: Tensor,
        *,
        batch_index: Tensor | None = None,
        transform_batch: int | None = None,
    ) -> dict[str, Any]:
        """Decode z to the distribution of counts.

        Parameters
        ----------
        z : Tensor[..., n_cells, n_latent]
        library : Tensor[..., n_cells, 1], as `inference` returns it
        y : Tensor[n_cells, 1], label codes
        batch_index : Tensor[n_cells, 1], optional
            Batch codes, in models with batches.
        transform_batch : int, optional
            Decode every cell as if it came from this batch.

        Returns
        -------
        dict
            ``px_scale`` and ``px_rate`` (Tensor[..., n_cells, n_input]), ``px_r`` (Tensor[n_input]:
            logits in the softplus form, inverse dispersion in the softmax form) and ``px``
            (NegativeBinomial).
        """
        if transform_batch is not None:
            batch_index = torch.full_like(y, transform_batch)
        self._check_codes(y, batch_index, z.shape[-2])
        px_scale = self._px_scale(self.decoder_hidden(z, y, batch_index), y)
        px_rate = library * px_scale
        px = self._counts(px_rate, px_scale)
        px_r = self.px_r if self.is_softplus else torch.exp(self.px_r)
        return {"px_scale": px_scale, "px_rate": px_rate, "px_r": px_r, "px": px}

    @working_precision
    def loss(
        self,
        tensors: Mapping[str, Tensor],
        inference_outputs: Mapping[str, Any],
        generative_outputs: Mapping[str, Any],
        kl_weight: float = 1.0,
        classification_ratio: float = 5.0,
    ) -> LossOutput:
        """Return the negative evidence lower bound, weighted by label.

        Parameters
        ----------
        tensors : Mapping
            ``X`` (Tensor[n_cells, n_input], raw counts), ``labels`` (Tensor[n_cells, 1]) and, in
            models with fine labels, ``fine_labels`` (Tensor[n_cells, 1]).
        inference_outputs, generative_outputs : Mapping
            What `inference` and `generative` returned.
        kl_weight : float
            Weight of the Kullback-Leibler term.
        classification_ratio : float
            Weight of the fine labels' cross-entropy.

        Returns
        -------
        LossOutput
        """
        y, qz = tensors["labels"], inference_outputs["qz"]
        kl_local = self.kl(qz, y)
        reconstruction = -generative_outputs["px"].log_prob(tensors["X"]).sum(-1)
        per_cell = reconstruction + kl_weight * kl_local
        classification = None
        if self.config.n_fine_labels is not None:
            logits = self.classify(qz.loc, y)
            classification = classification_ratio * classification_loss(
                logits, tensors["fine_labels"]
            )
            per_cell = per_cell + classification
        loss = torch.mean(self._cell_weight(y) * per_cell)
        return LossOutput(loss, reconstruction, kl_local, classification_loss=classification)

    @working_precision
    def forward(
        self,
        tensors: Mapping[str, Tensor],
        inference_kwargs: Mapping[str, Any] | None = None,
        generative_kwargs: Mapping[str, Any] | None = None,
        loss_kwargs: Mapping[str, Any] | None = None,
        compute_loss: bool = True,
    ) -> tuple[Any, ...]:
        """Run inference, generative and, unless told otherwise, the loss.

        Parameters
        ----------
        tensors : Mapping
            ``X`` (Tensor[n_cells, n_input], raw counts), ``labels`` (Tensor[n_cells, 1]) and,
            in models with batches, ``batch`` (Tensor[n_cells, 1]).
        inference_kwargs, generative_kwargs, loss_kwargs : Mapping, optional
            Further arguments of the three.
        compute_loss : bool
            Whether the loss is the third element.

        Returns
        -------
        tuple
            Inference outputs, generative outputs and, if computed, a LossOutput.
        """
        y, batch_index = tensors["labels"], tensors.get("batch")
        inferred = self.inference(
            tensors["X"], y, batch_index=batch_index, **(inference_kwargs or {})
        )
        generated = self.generative(
            inferred["z"],
            inferred["library"],
            y,
            batch_index=batch_index,
            **(generative_kwargs or {}),
        )
        if not compute_loss:
            return inferred, generated
        return inferred, generated, self.loss(tensors, inferred, generated, **(loss_kwargs or {}))

    @torch.no_grad()
    def sample(self, tensors: Mapping[str, Tensor], n_samples: int = 1) -> Tensor:
        r"""Draw counts from the posterior predictive distribution :math:`p(\hat{x} \mid x)`.

        Every draw has its own z. Dropout is off; torch's global generator gives the seed.

        Parameters
        ----------
        tensors : Mapping
            As in `forward`.
        n_samples : int
            Draws a cell.

        Returns
        -------
        Tensor[n_cells, n_input, n_samples], non-negative whole numbers, on the CPU

        Raises
        ------
        CountsError
            If `tensors` do not fit the model.
        """
        if n_samples < 1:
            raise CountsError(f"VAEC.sample: n_samples={n_samples}", "ask for at least one draw")
        was_training = self.training
        self.eval()
        try:
            inferred = self.inference(
                tensors["X"], tensors["labels"], batch_index=tensors.get("batch")
            )
            draws = draw_posterior(self, tensors, inferred, n_samples)
        finally:
            self.train(was_training)
        n_rows = len(tensors["labels"]) * n_samples
        rows = torch.from_numpy(np.repeat(np.arange(n_rows), np.diff(draws.indptr)))
        counts = torch.zeros(n_rows, self.config.n_input, dtype=torch.float32)
        counts[rows, draws.indices] = torch.from_numpy(draws.counts).float()
        return counts.view(-1, n_samples, self.config.n_input).transpose(1, 2).contiguous()

    def _check_codes(self, y: Tensor, batch_index: Tensor | None, n_cells: int) -> None:
        check_codes("labels", y, self.config.n_labels, n_cells)
        check_codes("batch", batch_index, self.config.n_batch, n_cells)

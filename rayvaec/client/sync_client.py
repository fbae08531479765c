"""Blocking client: the asynchronous one, driven without an event loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Self

import httpx
import numpy as np
from numpy.typing import NDArray

from rayvaec.client.anndata_io import Form
from rayvaec.client.async_client import AsyncClient, settings
from rayvaec.client.retry import RetryPolicy
from rayvaec.client.transport import BlockingTransport, finished, stepped
from rayvaec.util.messages import Names

if TYPE_CHECKING:
    from anndata import AnnData
    from scipy.sparse import csr_matrix


class Client:
    """One served model.

    Parameters
    ----------
    url : str
        Such as ``"http://127.0.0.1:8000"``.
    token : str, optional
        The endpoint's token; by default the environment variable RAYVAEC_TOKEN, if it is set.
    model : str, optional
        Name of one of several models that are served; not needed where there is one.
    timeout : float
        Seconds without a byte from the server after which a request is given up.
    retries : int
        How often in a row a request is sent again that was turned away (429, 503), that found no
        connection or no answer within `timeout`, or whose answer broke off; cells that have come
        are not asked for again. The server's Retry-After is honoured, up to a minute.
    deadline : float
        Seconds without a byte of an answer after which a call ends, however often it was sent.
    progress : bool
        Whether to show how many cells have come: a bar on a terminal, log lines elsewhere.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        *,
        model: str | None = None,
        timeout: float = 300.0,
        retries: int = 5,
        deadline: float = 600.0,
        progress: bool = False,
    ) -> None:
        transport = BlockingTransport(httpx.Client(**settings(url, token, timeout)))
        retry_policy = RetryPolicy(retries, deadline)
        self._client = AsyncClient.over(
            transport, url, model=model, retry_policy=retry_policy, progress=progress
        )
        self.url = self._client.url

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        finished(self._client.close())

    def ready(self) -> bool:
        """Return whether the server answers and its model is loaded; waits 5 seconds at most."""
        return finished(self._client.ready())

    def model(self) -> dict[str, Any]:
        """Ask for the model: genes, labels, configuration, hashes and limits.

        Returns
        -------
        dict
            The JSON of /v1/model.

        Raises
        ------
        RequestError
            If the request is refused or no server answers.
        """
        return finished(self._client.model())

    def sample(
        self,
        adata: AnnData,
        labels_key: str | None = None,
        n_samples: int = 1,
        seed: int | None = None,
        *,
        layer: str | None = None,
        batch_key: str | None = None,
        reduce: Names | None = None,
        quantiles: float | Sequence[float] | None = None,
        out_genes: Names | None = None,
        allow_missing: bool = False,
        as_: Form = "adata",
    ) -> AnnData | list[csr_matrix] | NDArray[np.int32] | dict[str, NDArray[np.float32]]:
        """Draw counts from the posterior predictive distribution of given cells.

        Parameters
        ----------
        adata : AnnData
            Raw counts of cells x genes, genes in any order. Cells that share a name are told apart
            by their occurrence, with a warning; they get the draws of `TrainedModel.sample`.
        labels_key : str, optional
            Column of obs with the labels; by default the one that the model was trained on.
        n_samples : int
            Draws a cell.
        seed : int, optional
            Seed of all draws; the server chooses one by default.
        layer : str, optional
            Layer with the counts; X by default, ``"raw"`` for the counts and genes of
            ``adata.raw``.
        batch_key : str, optional
            Column of obs with the batches; by default the model's own, if it has one.
        reduce : sequence of str, optional
            Moments of the draws to return instead: ``mean``, ``var``, ``zero_fraction``,
            ``quantiles``.
        quantiles : sequence of float, optional
            With ``quantiles`` in `reduce`, which of them: numbers from 0 to 1; 0.5 comes as
            ``quantile_0.5``.
        out_genes : sequence of str, optional
            Genes to return, in this order; all by default.
        allow_missing : bool
            Whether genes of the model that `adata` lacks count as zero.
        as_ : {"adata", "csr", "array"}
            What to return.

        Returns
        -------
        AnnData, list of csr_matrix, or array
            An AnnData with one sparse layer a draw (``sample_0``, ...); or a list of n_samples
            matrices, each n_cells x n_genes; or one int32 array, n_cells x n_genes x n_samples.
            With `reduce`, an AnnData with one dense layer a moment, or a dict of arrays. In an
            AnnData, ``uns["rayvaec"]`` has the seed and the model's hash.

        Raises
        ------
        RequestError
            If the server refuses the request; its words say why and what to do.
        CountsError
            If `adata` is not an AnnData in memory, lacks a column or layer, or holds values that
            are not counts.
        """
        work = self._client.sample(
            adata,
            labels_key,
            n_samples,
            seed,
            layer=layer,
            batch_key=batch_key,
            reduce=reduce,
            quantiles=quantiles,
            out_genes=out_genes,
            allow_missing=allow_missing,
            as_=as_,
        )
        return finished(work)

    def iter_sample(
        self,
        adata: AnnData,
        labels_key: str | None = None,
        n_samples: int = 1,
        seed: int | None = None,
        **options: Any,
    ) -> Iterator[AnnData | list[csr_matrix] | NDArray[np.int32] | dict[str, NDArray[np.float32]]]:
        """Draw counts, some cells at a time: for more draws than memory holds.

        Parameters
        ----------
        adata, labels_key, n_samples, seed
            As in `sample`.
        **options
            ``layer``, ``batch_key``, ``reduce``, ``quantiles``, ``out_genes``, ``allow_missing``,
            ``as_`` of `sample`.

        Yields
        ------
        AnnData, list of csr_matrix, or array
            What `sample` returns, for the next few cells of `adata`, all draws of each; in order,
            about 16 MiB at a time.

        Raises
        ------
        RequestError, CountsError
            As `sample`.
        """
        return stepped(self._client.iter_sample(adata, labels_key, n_samples, seed, **options))

    def generate(
        self,
        labels: Names,
        library: float | Sequence[float],
        n_cells: int | None = None,
        *,
        n_samples: int = 1,
        seed: int | None = None,
        cell_ids: Names | None = None,
        batches: Names | None = None,
        reduce: Names | None = None,
        quantiles: float | Sequence[float] | None = None,
        out_genes: Names | None = None,
        as_: Form = "adata",
    ) -> AnnData | list[csr_matrix] | NDArray[np.int32] | dict[str, NDArray[np.float32]]:
        """Draw new cells from the prior.

        Parameters
        ----------
        labels : str, number or sequence of them
            Cell type of all cells, or one per cell. Numbers are read as their text.
        library : float or sequence of float
            Total counts a cell is expected to have: one number, or one per cell.
        n_cells : int, optional
            Number of cells; by default that of `labels`, 1 where that is one for all.
        cell_ids : sequence of str, optional
            Name of each cell; repeated ones are told apart by their occurrence, with a warning.
        batches : str, number or sequence of them, optional
            Experimental batch of all cells, or one per cell.
        n_samples, seed, reduce, quantiles, out_genes, as_
            As in `sample`.

        Returns
        -------
        AnnData, list of csr_matrix, or array
            As `sample`; ``obs["label"]`` has the labels.

        Raises
        ------
        ConfigError
            If there are not as many names, batches or totals as cells.
        RequestError
            As `sample`.
        """
        work = self._client.generate(
            labels,
            library,
            n_cells,
            n_samples=n_samples,
            seed=seed,
            cell_ids=cell_ids,
            batches=batches,
            reduce=reduce,
            quantiles=quantiles,
            out_genes=out_genes,
            as_=as_,
        )
        return finished(work)

    def latent(
        self, adata: AnnData, labels_key: str | None = None, **alignment: Any
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return mean and variance of the posterior of z.

        Parameters
        ----------
        adata, labels_key
            As in `sample`.
        **alignment
            ``layer``, ``batch_key``, ``allow_missing`` of `sample`.

        Returns
        -------
        tuple of arrays[n_cells, n_latent]

        Raises
        ------
        RequestError, CountsError
            As `sample`.
        """
        return finished(self._client.latent(adata, labels_key, **alignment))

    def expression(
        self,
        adata: AnnData,
        labels_key: str | None = None,
        *,
        out_genes: Names | None = None,
        **alignment: Any,
    ) -> NDArray[np.float32]:
        """Return denoised expression: each gene's share of a cell's expected counts.

        Parameters
        ----------
        adata, labels_key, out_genes
            As in `sample`.
        **alignment
            ``layer``, ``batch_key``, ``allow_missing`` of `sample`.

        Returns
        -------
        array[n_cells, n_genes]

        Raises
        ------
        RequestError, CountsError
            As `sample`.
        """
        work = self._client.expression(adata, labels_key, out_genes=out_genes, **alignment)
        return finished(work)

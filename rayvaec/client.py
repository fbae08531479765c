"""Ask a served model: AnnData in, AnnData out.

::

    from rayvaec.client import Client

    with Client("http://127.0.0.1:8000") as client:
        drawn = client.sample(adata, labels_key="cell_type", n_samples=10, seed=0)

Needs neither torch nor ray. Cells travel as Arrow streams; genes are sent by name, so that the
server aligns them, and cells by their obs names, so that a cell's draws do not depend on what else
is in a request.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self, TypeVar

import httpx
import numpy as np
from numpy.typing import NDArray

from rayvaec.errors import RequestError
from rayvaec.serve.wire import (
    ARROW,
    AnswerStream,
    Form,
    cells_of,
    encode_cells,
    encode_new_cells,
    moments_as,
    rows_as,
)

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from scipy.sparse import csr_matrix

Result = TypeVar("Result")

_LONGEST_WAIT_S = 60.0


class Client:
    """One served model.

    Parameters
    ----------
    url : str
        Such as ``"http://127.0.0.1:8000"``.
    token : str, optional
        The endpoint's token; by default the environment variable RAYVAEC_TOKEN, if it is set.
    timeout : float
        Seconds without a byte from the server after which a request has failed.
    retries : int
        How often a request is sent again that was turned away (429, 503) or whose answer broke
        off. The server's Retry-After is honoured, up to a minute.
    """

    def __init__(
        self, url: str, token: str | None = None, *, timeout: float = 300.0, retries: int = 5
    ) -> None:
        self.url, self._retries = url.rstrip("/"), retries
        token = token or os.environ.get("RAYVAEC_TOKEN")
        headers = {"Authorization": f"Bearer {token.strip()}"} if token else {}
        self._http = httpx.Client(
            base_url=self.url, headers=headers, timeout=httpx.Timeout(timeout, connect=10.0)
        )
        self._model: dict[str, Any] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def ready(self) -> bool:
        """Return whether the server answers and its model is loaded; waits 5 seconds at most."""
        try:
            return self._http.get("/readyz", timeout=5.0).status_code == 200
        except httpx.TransportError:
            return False

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

        def ask() -> dict[str, Any]:
            response = self._http.get("/v1/model")
            _raise_for(response)
            return response.json()

        self._model = self._retrying(ask)
        return self._model

    def sample(
        self,
        adata: AnnData,
        labels_key: str | None = None,
        n_samples: int = 1,
        seed: int | None = None,
        *,
        layer: str | None = None,
        batch_key: str | None = None,
        reduce: Sequence[str] | None = None,
        out_genes: Sequence[str] | None = None,
        allow_missing: bool = False,
        as_: Form = "adata",
    ) -> AnnData | list[csr_matrix] | NDArray[np.int32] | dict[str, NDArray[np.float32]]:
        """Draw counts from the posterior predictive distribution of given cells.

        Parameters
        ----------
        adata : AnnData
            Raw counts of cells x genes, genes in any order.
        labels_key : str, optional
            Column of obs with the labels; by default the one that the model was trained on.
        n_samples : int
            Draws a cell.
        seed : int, optional
            Seed of all draws; the server chooses one by default.
        layer : str, optional
            Layer with the counts; X by default.
        batch_key : str, optional
            Column of obs with the batches; by default the model's own, if it has one.
        reduce : sequence of str, optional
            Moments of the draws to return instead: ``mean``, ``var``, ``zero_fraction``.
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
            If `adata` lacks a column or layer, or holds no counts.
        """
        parameters = _given(n_samples=n_samples, seed=seed, reduce=reduce, out_genes=out_genes)
        body = self._cells_body(
            *(adata, labels_key),
            parameters=parameters,
            batch_key=batch_key,
            layer=layer,
            allow_missing=allow_missing,
        )
        facts, rows = self._ask("/v1/sample", body, dense=bool(reduce))
        return self._put(facts, rows, out_genes, adata.obs, as_)

    def generate(
        self,
        labels: str | Sequence[str],
        library: float | Sequence[float],
        n_cells: int | None = None,
        *,
        n_samples: int = 1,
        seed: int | None = None,
        cell_ids: Sequence[str] | None = None,
        batches: Sequence[str] | None = None,
        reduce: Sequence[str] | None = None,
        out_genes: Sequence[str] | None = None,
        as_: Form = "adata",
    ) -> AnnData | list[csr_matrix] | NDArray[np.int32] | dict[str, NDArray[np.float32]]:
        """Draw new cells from the prior.

        Parameters
        ----------
        labels : str or sequence of str
            Cell type of all cells, or one per cell.
        library : float or sequence of float
            Total counts a cell is expected to have: one number, or one per cell.
        n_cells : int, optional
            Number of cells, where `labels` is one for all; 1 by default.
        cell_ids, batches : sequence of str, optional
            Name and experimental batch of each cell.
        n_samples, seed, reduce, out_genes, as_
            As in `sample`.

        Returns
        -------
        AnnData, list of csr_matrix, or array
            As `sample`; ``obs["label"]`` has the labels.

        Raises
        ------
        RequestError
            As `sample`.
        """
        import pandas as pd

        every = [labels] * (n_cells or 1) if isinstance(labels, str) else list(labels)
        libraries = np.broadcast_to(np.asarray(library, np.float64), len(every))
        parameters = _given(n_samples=n_samples, seed=seed, reduce=reduce, out_genes=out_genes)
        body = encode_new_cells(every, libraries, batches, cell_ids, parameters)
        facts, rows = self._ask("/v1/generate", body, dense=bool(reduce))
        names = [str(i) for i in range(len(every))] if cell_ids is None else list(cell_ids)
        obs = pd.DataFrame({"label": pd.Categorical(every)}, index=names)
        return self._put(facts, rows, out_genes, obs, as_)

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
        body = self._cells_body(adata, labels_key, parameters={}, **alignment)
        _, columns = self._ask("/v1/latent", body, dense=True)
        return columns["mean"], columns["variance"]

    def expression(
        self,
        adata: AnnData,
        labels_key: str | None = None,
        *,
        out_genes: Sequence[str] | None = None,
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
        parameters = _given(out_genes=out_genes)
        body = self._cells_body(adata, labels_key, parameters=parameters, **alignment)
        _, columns = self._ask("/v1/expression", body, dense=True)
        return columns["expression"]

    def _cells_body(
        self,
        adata: AnnData,
        labels_key: str | None,
        *,
        parameters: Mapping[str, Any],
        batch_key: str | None = None,
        layer: str | None = None,
        allow_missing: bool = False,
    ) -> bytes:
        model = self._model or self.model()
        if model["batch_key"] is None:
            batch_key = None
        cells, genes = cells_of(
            *(adata, labels_key or model["labels_key"], batch_key or model["batch_key"], layer)
        )
        return encode_cells(cells, {**parameters, "genes": genes, "allow_missing": allow_missing})

    def _ask(self, path: str, body: bytes, dense: bool) -> tuple[dict[str, Any], Any]:
        """Send a request; return what its whole answer says, and the answer's rows."""
        headers = {"Content-Type": ARROW, "Accept": ARROW}

        def ask() -> tuple[dict[str, Any], Any]:
            with self._http.stream("POST", path, content=body, headers=headers) as response:
                _raise_for(response)
                answer = AnswerStream(response.iter_raw())
                return answer.parameters, answer.dense() if dense else answer.draws()

        return self._retrying(ask)

    def _put(
        self,
        facts: Mapping[str, Any],
        rows: Any,
        out_genes: Sequence[str] | None,
        obs: pd.DataFrame,
        form: Form,
    ) -> Any:
        genes = out_genes
        if genes is None:
            model = self._model or self.model()
            if model["model_hash"] != facts["model_hash"]:  # another one is served by now
                model = self.model()
            genes = model["genes"]
        put = moments_as if isinstance(rows, dict) else rows_as
        return put(form, rows, facts, obs, genes)

    def _retrying(self, ask: Callable[[], Result]) -> Result:
        attempt = 0
        while True:
            try:
                return ask()
            except _TurnedAwayError as again:
                failure, wait = again.failure, again.wait
            except (httpx.ConnectError, httpx.TimeoutException) as error:
                raise self._unreachable(error) from error
            except httpx.TransportError as error:  # broke off, as when a replica is killed
                failure, wait = self._unreachable(error), 0.0
            except RequestError as error:
                if error.error != "broken_answer":
                    raise
                failure, wait = error, 0.0
            if attempt >= self._retries:
                raise failure
            backoff = 0.25 * 2**attempt * random.uniform(1.0, 1.5)  # noqa: S311 - no secret
            time.sleep(min(max(wait, backoff), _LONGEST_WAIT_S))
            attempt += 1

    def _unreachable(self, error: httpx.TransportError) -> RequestError:
        return RequestError(
            f"no answer from {self.url} ({error or type(error).__name__})",
            "check the address, and that the server runs: rayvaec serve MODEL",
            *(503, "unreachable"),
        )


class _TurnedAwayError(Exception):
    """A refusal that may not stand the next time."""

    def __init__(self, failure: RequestError, wait: float) -> None:
        super().__init__(failure, wait)
        self.failure, self.wait = failure, wait


def _raise_for(response: httpx.Response) -> None:
    """Raise the server's words as a `RequestError`, or as `_TurnedAwayError`."""
    if response.status_code < 400:
        return
    response.read()
    said, status = _said(response), response.status_code
    failure = RequestError(
        said.get("detail") or f"the server answers {status} {response.reason_phrase}",
        said.get("fix", ""),
        status,
        said.get("error", "refused"),
        said.get("request_id") or response.headers.get("X-Request-ID", ""),
    )
    # A 5xx without the endpoint's own body comes from the proxy before it: its replica is gone.
    if status in (429, 503) or (status >= 500 and not said):
        raise _TurnedAwayError(failure, _retry_after(response))
    raise failure


def _said(response: httpx.Response) -> dict[str, str]:
    try:
        body = response.json()
    except ValueError:
        return {}
    return body if isinstance(body, dict) and "detail" in body else {}


def _retry_after(response: httpx.Response) -> float:
    try:
        return max(float(response.headers.get("Retry-After", "0")), 0.0)
    except ValueError:  # a date, which the endpoint does not send
        return 0.0


def _given(**parameters: Any) -> dict[str, Any]:
    """Return the parameters that are not None, sequences as lists."""
    return {
        name: value if isinstance(value, str | int) else list(value)
        for name, value in parameters.items()
        if value is not None
    }

"""Asynchronous client: requests, retries and resumption of broken streams."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from numbers import Integral
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote

import httpx
import numpy as np
from numpy.typing import NDArray

from rayvaec.client.anndata_io import Form, cells_of, moments_as, rows_as
from rayvaec.client.assembly import PART_BYTES, Part, RowAssembler, whole
from rayvaec.client.chunking import GivenCells, RequestChunks, chunk_requests, new_cells
from rayvaec.client.errors import RetryableError, check
from rayvaec.client.retry import Attempts, RetryPolicy
from rayvaec.client.transport import AsyncTransport, Transport
from rayvaec.errors import ConfigError, ConflictError, RequestError
from rayvaec.protocol import ARROW, AnswerStream
from rayvaec.util.messages import Names, as_names
from rayvaec.util.progress import Progress

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

CONNECT_TIMEOUT_S = 10.0
_READY_TIMEOUT_S = 5.0
_JSON_SAFE_SEED = 2**53


def settings(url: str, token: str | None, timeout: float) -> dict[str, Any]:
    """Return the arguments of an httpx client: address, token and timeouts."""
    token = token or os.environ.get("RAYVAEC_TOKEN")
    headers = {"Content-Type": ARROW, "Accept": ARROW}
    if token:
        headers["Authorization"] = f"Bearer {token.strip()}"
    timeouts = httpx.Timeout(timeout, connect=min(CONNECT_TIMEOUT_S, timeout))
    # Many requests may wait for their answers at once; the server says when they are too many.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=32)
    return {"base_url": url.rstrip("/"), "headers": headers, "timeout": timeouts, "limits": limits}


class AsyncClient:
    """One served model, asked with ``await``.

    ::

        async with AsyncClient("http://127.0.0.1:8000") as client:
            drawn = await client.sample(adata, n_samples=10, seed=0)

    Parameters
    ----------
    url, token, model, timeout, retries, deadline, progress
        As in `rayvaec.client.Client`.
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
        transport = AsyncTransport(httpx.AsyncClient(**settings(url, token, timeout)))
        self._take(transport, url, model, RetryPolicy(retries, deadline), progress)

    def _take(
        self,
        transport: Transport,
        url: str,
        model: str | None,
        retry_policy: RetryPolicy,
        progress: bool,
    ) -> None:
        self.url, self._transport = url.rstrip("/"), transport
        self._routes = "/v1" if model is None else f"/v1/models/{quote(model, safe='')}"
        self._retry_policy, self._progress = retry_policy, progress
        self._model: dict[str, Any] | None = None

    @classmethod
    def over(
        cls,
        transport: Transport,
        url: str,
        *,
        model: str | None,
        retry_policy: RetryPolicy,
        progress: bool,
    ) -> AsyncClient:
        """Return a client over another transport."""
        client = cls.__new__(cls)
        client._take(transport, url, model, retry_policy, progress)
        return client

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._transport.close()

    async def ready(self) -> bool:
        """Return whether the server answers and its model is loaded; waits 5 seconds at most."""
        try:
            async with self._transport.ask("GET", "/readyz", timeout=_READY_TIMEOUT_S) as reply:
                return reply.status == 200
        except httpx.TransportError:
            return False

    async def model(self) -> dict[str, Any]:
        """Ask for the model, as `Client.model`."""
        attempts = self._retry_policy.attempts()
        while True:
            try:
                return await self._ask_for_model(attempts)
            except (RetryableError, RequestError, httpx.TransportError) as error:
                await self._transport.sleep(attempts.wait(self.url, error))

    async def _ask_for_model(self, attempts: Attempts) -> dict[str, Any]:
        path, timeout = f"{self._routes}/model", attempts.left
        async with self._transport.ask("GET", path, timeout=timeout) as reply:
            self._model = json.loads(await (await check(reply)).whole())
        return self._model

    async def sample(
        self,
        adata: AnnData,
        labels_key: str | None = None,
        n_samples: int = 1,
        seed: int | None = None,
        *,
        reduce: Names | None = None,
        quantiles: float | Sequence[float] | None = None,
        out_genes: Names | None = None,
        as_: Form = "adata",
        **alignment: Any,
    ) -> Any:
        """Draw counts for given cells; parameters, result and errors as `Client.sample`."""
        asked = _draws(n_samples, seed, reduce=reduce, quantiles=quantiles, out_genes=out_genes)
        answers = await self._of_cells("sample", adata, labels_key, asked, **alignment)
        return await self._put(await _collected(answers), adata.obs, asked.get("out_genes"), as_)

    async def iter_sample(
        self,
        adata: AnnData,
        labels_key: str | None = None,
        n_samples: int = 1,
        seed: int | None = None,
        *,
        reduce: Names | None = None,
        quantiles: float | Sequence[float] | None = None,
        out_genes: Names | None = None,
        as_: Form = "adata",
        **alignment: Any,
    ) -> AsyncGenerator[Any, None]:
        """Draw counts, some cells at a time, as `Client.iter_sample`."""
        asked = _draws(n_samples, seed, reduce=reduce, quantiles=quantiles, out_genes=out_genes)
        answers = await self._of_cells("sample", adata, labels_key, asked, **alignment)
        async with aclosing(answers):
            async for part in answers:
                obs = adata.obs.iloc[part.first : part.first + part.n_cells]
                yield await self._put(part, obs, asked.get("out_genes"), as_)

    async def generate(
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
    ) -> Any:
        """Draw new cells from the prior; parameters, result and errors as `Client.generate`."""
        import pandas as pd

        asked = _draws(n_samples, seed, reduce=reduce, quantiles=quantiles, out_genes=out_genes)
        cells = new_cells(labels, library, n_cells, batches=batches, cell_ids=cell_ids)
        part = await _collected(self._answers("generate", cells, asked))
        names = range(len(cells)) if cell_ids is None else as_names(cell_ids)
        obs = pd.DataFrame({"label": pd.Categorical(cells.labels)}, index=[str(n) for n in names])
        return await self._put(part, obs, asked.get("out_genes"), as_)

    async def latent(
        self, adata: AnnData, labels_key: str | None = None, **alignment: Any
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return mean and variance of the posterior of z, as `Client.latent`."""
        answers = await self._of_cells("latent", adata, labels_key, {}, **alignment)
        columns: Any = (await _collected(answers)).rows
        return columns["mean"], columns["variance"]

    async def expression(
        self,
        adata: AnnData,
        labels_key: str | None = None,
        *,
        out_genes: Names | None = None,
        **alignment: Any,
    ) -> NDArray[np.float32]:
        """Return denoised expression, as `Client.expression`."""
        asked = _named(out_genes=out_genes)
        answers = await self._of_cells("expression", adata, labels_key, asked, **alignment)
        columns: Any = (await _collected(answers)).rows
        return columns["expression"]

    async def _of_cells(
        self,
        what: str,
        adata: AnnData,
        labels_key: str | None,
        asked: dict[str, Any],
        *,
        layer: str | None = None,
        batch_key: str | None = None,
        allow_missing: bool = False,
    ) -> AsyncGenerator[Part, None]:
        """Return the answers about an AnnData's cells."""
        model = self._model or await self.model()
        batch_key = None if model["batch_key"] is None else batch_key or model["batch_key"]
        cells, genes = cells_of(adata, labels_key or model["labels_key"], batch_key, layer)
        return self._answers(
            what, GivenCells(cells), {**asked, "genes": genes, "allow_missing": allow_missing}
        )

    async def _answers(
        self, what: str, cells: RequestChunks, asked: Mapping[str, Any]
    ) -> AsyncGenerator[Part, None]:
        """Yield all cells' rows, part by part, from as many requests as it takes."""
        model = self._model or await self.model()
        facts: Mapping[str, Any] | None = None
        with _Bar(len(cells), what, shown=self._progress) as bar:
            for start, stop in chunk_requests(cells, model, asked):
                async with aclosing(self._portion(what, cells, start, stop, asked)) as parts:
                    async for part in parts:
                        facts = _same_model(facts or part.facts, part.facts)
                        bar.advance(part.n_cells)
                        yield part

    async def _portion(
        self, what: str, cells: RequestChunks, start: int, stop: int, asked: Mapping[str, Any]
    ) -> AsyncGenerator[Part, None]:
        """Yield some cells' rows; after a failure, ask for those that have not come."""
        done, attempts = start, self._retry_policy.attempts()
        while True:
            first = done if cells.named else start
            body = cells.body(first, stop, asked)
            try:
                answer = self._answer(what, body, first, asked, attempts)
                async with aclosing(answer) as parts:
                    async for part in parts:
                        if (new := part.beyond(done)) is not None:
                            done = new.first + new.n_cells
                            yield new
                            attempts.reset()
                return
            except (RetryableError, RequestError, httpx.TransportError) as error:
                await self._transport.sleep(attempts.wait(self.url, error))

    async def _answer(
        self, what: str, body: bytes, first: int, asked: Mapping[str, Any], attempts: Attempts
    ) -> AsyncGenerator[Part, None]:
        """Send one request and yield its rows; end with an error unless all have come."""
        dense = what not in ("sample", "generate") or bool(asked.get("reduce"))
        stream = AnswerStream()
        rows = RowAssembler(stream, first, 1 if dense else asked["n_samples"], dense)
        path, timeout = f"{self._routes}/{what}", attempts.left
        async with self._transport.ask("POST", path, body, timeout=timeout) as reply:
            await check(reply)
            async for chunk in reply.chunks:
                attempts.record_progress()
                stream.feed(chunk)
                if stream.n_waiting >= PART_BYTES and (part := rows.take()) is not None:
                    yield part
        stream.finish()
        if (part := rows.take()) is not None:
            yield part

    async def _put(
        self, part: Part, obs: pd.DataFrame, out_genes: list[str] | None, form: Form
    ) -> Any:
        """Put rows into the form that was asked for."""
        genes = out_genes
        if genes is None:
            model = self._model or await self.model()
            if model["model_hash"] != part.facts["model_hash"]:  # another one is served by now
                model = await self.model()
            genes = model["genes"]
        facts = {**part.facts, "n_cells": part.n_cells}
        if isinstance(part.rows, dict):
            return moments_as(form, part.rows, facts, obs, genes)
        return rows_as(form, part.rows, facts, obs, genes)


class _Bar:
    """How many cells have come, where that is to be shown."""

    def __init__(self, total: int, what: str, shown: bool) -> None:
        self._progress = Progress(total, "cells", what) if shown else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._progress is not None:
            self._progress.__exit__(*exc_info)

    def advance(self, n_cells: int) -> None:
        """Count more cells."""
        if self._progress is not None:
            self._progress.advance(n_cells)


async def _collected(answers: AsyncGenerator[Part, None]) -> Part:
    async with aclosing(answers):
        return whole([part async for part in answers])


def _same_model(facts: Mapping[str, Any], others: Mapping[str, Any]) -> Mapping[str, Any]:
    if facts["model_hash"] != others["model_hash"]:
        raise ConflictError(
            f"the model changed from {facts['model_hash']} to {others['model_hash']} while the "
            "answer came",
            "ask again, for all cells to be drawn from one model",
        )
    return facts


def _draws(
    n_samples: int,
    seed: int | None,
    *,
    reduce: Names | None,
    quantiles: float | Sequence[float] | None,
    out_genes: Names | None,
) -> dict[str, Any]:
    """Return the parameters of draws; the seed is chosen here, as several requests may share it."""
    for name, value, least in (("n_samples", n_samples, 1), ("seed", seed or 0, 0)):
        if not isinstance(value, Integral) or value < least:
            raise ConfigError(f"{name}={value}", f"give a whole number >= {least}")
    asked: dict[str, Any] = {
        "n_samples": int(n_samples),
        "seed": secrets.randbelow(_JSON_SAFE_SEED) if seed is None else int(seed),
    }
    if quantiles is not None:
        asked["quantiles"] = np.atleast_1d(np.asarray(quantiles, np.float64)).tolist()
    return asked | _named(reduce=reduce, out_genes=out_genes)


def _named(**parameters: Names | None) -> dict[str, Any]:
    """Return the lists of names that are not None."""
    return {name: as_names(value) for name, value in parameters.items() if value is not None}

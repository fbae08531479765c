"""Limits of a request's size and cost, and of concurrency."""

from __future__ import annotations

from dataclasses import dataclass, fields

from rayvaec.errors import ConfigError, PayloadTooLargeError, UnprocessableError
from rayvaec.protocol import ARROW, H5AD, JSON


@dataclass(frozen=True)
class Limits:
    """Bounds on requests, per replica.

    Parameters
    ----------
    max_body_bytes : int
        Largest body, as sent and once decompressed.
    max_json_bytes : int
        The same for JSON, of bodies and of parameters in an Arrow stream's schema: JSON takes
        many times its size in memory, and other requests wait while it is parsed.
    max_cells : int
        Most cells a request.
    max_cost : int
        Largest cells * genes * n_samples.
    max_json_cost : int
        The same where the answer is JSON, which is held whole in memory.
    max_json_values : int
        Most numbers in a dense JSON answer (latent, expression, moments).
    max_h5ad_cost : int
        Largest cells * genes * n_samples, and most numbers of a dense answer, where the answer is
        an h5ad file, which is held whole in memory.
    max_h5ad_layers : int
        Most draws a cell, each of them a layer, in an h5ad file.
    max_quantile_draws : int
        Largest genes * n_samples of a request for quantiles: the draws of one cell, which at worst
        are held while its quantiles are found.
    max_requests : int
        Requests at work or waiting; one more is answered with 429.
    max_held_bytes : int
        Most bytes that all requests may hold together: bodies as they arrive and decompressed,
        cells, and results that wait to be sent. What needs more is answered with 429.
    timeout_s : float
        Longest time until an answer begins, and until its client takes some more of it.

    Raises
    ------
    ConfigError
        If a bound is not positive, or `max_body_bytes` above `max_held_bytes`.
    """

    max_body_bytes: int = 64 * 2**20
    max_json_bytes: int = 8 * 2**20
    max_cells: int = 100_000
    max_cost: int = 4_000_000_000
    max_json_cost: int = 20_000_000
    max_json_values: int = 2_000_000
    max_h5ad_cost: int = 50_000_000
    max_h5ad_layers: int = 1000
    max_quantile_draws: int = 40_000_000
    max_requests: int = 64
    max_held_bytes: int = 2**30
    timeout_s: float = 300.0

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) > 0:
                raise ConfigError(
                    f"the limit {field.name} is {getattr(self, field.name)}",
                    "give a number above 0",
                )
        if self.max_body_bytes > self.max_held_bytes:
            raise ConfigError(
                f"the limit max_body_bytes is {self.max_body_bytes:,}, above max_held_bytes, "
                f"{self.max_held_bytes:,}",
                "raise max_held_bytes to some times as much",
            )

    def body_bytes(self, kind: str) -> int:
        """Return the largest body of a media type."""
        return (
            min(self.max_json_bytes, self.max_body_bytes) if kind == JSON else self.max_body_bytes
        )


def check_cost(
    n_cells: int, n_genes: int, n_samples: int, limits: Limits, answer: str = ARROW
) -> None:
    """Refuse work that is too large before any of it is done.

    Parameters
    ----------
    n_cells, n_genes, n_samples : int
        Size of the work.
    limits : Limits
        The bounds.
    answer : str
        Media type in which the draws shall be answered.

    Raises
    ------
    RequestError
        413; it names the largest size that is allowed. 422 where there are no cells.
    """
    if n_cells < 1:
        raise UnprocessableError("the request has no cells", "send at least one", error="no_cells")
    if n_cells > limits.max_cells:
        raise PayloadTooLargeError(
            f"{n_cells:,} cells are above the largest number a request, {limits.max_cells:,}",
            "send several requests; draws are the same where cell_ids are given",
        )
    if answer == H5AD and n_samples > limits.max_h5ad_layers:
        raise PayloadTooLargeError(
            f"{n_samples:,} draws a cell would be as many layers, above the largest number, "
            f"{limits.max_h5ad_layers:,}",
            f"ask for fewer draws a request, or accept {ARROW}",
        )
    cost, largest = n_cells * n_genes * n_samples, limits.max_cost
    advice = "send fewer cells or ask for fewer draws a request"
    held = {JSON: limits.max_json_cost, H5AD: limits.max_h5ad_cost}.get(answer, largest)
    if held < largest:
        largest = held
        advice = f"{advice}, or accept {ARROW} for up to {limits.max_cost:,}"
    if cost > largest:
        raise PayloadTooLargeError(
            f"cells * genes * n_samples is {n_cells:,} * {n_genes:,} * {n_samples:,} = {cost:,}, "
            f"above the largest allowed, {largest:,}",
            advice,
        )


def check_dense(n_values: int, limits: Limits, answer: str) -> None:
    """Refuse a dense answer that is too large to be held whole.

    Parameters
    ----------
    n_values : int
        Numbers in the answer.
    limits : Limits
        The bounds.
    answer : str
        Media type of the answer; Arrow streams are not held.

    Raises
    ------
    RequestError
        413; it names the largest size that is allowed.
    """
    held = {JSON: ("JSON", limits.max_json_values), H5AD: ("h5ad", limits.max_h5ad_cost)}
    form, largest = held.get(answer, ("", n_values))
    if n_values > largest:
        raise PayloadTooLargeError(
            f"the answer would hold {n_values:,} numbers, above the largest in {form}, {largest:,}",
            f"accept {ARROW}, send fewer cells or name out_genes",
        )


def check_quantiles(n_genes: int, n_samples: int, limits: Limits) -> None:
    """Refuse quantiles over more draws of a cell than may be held.

    Parameters
    ----------
    n_genes : int
        Genes of the answer.
    n_samples : int
        Draws a cell.
    limits : Limits
        The bounds.

    Raises
    ------
    RequestError
        413; it names the largest size that is allowed.
    """
    if n_genes * n_samples > limits.max_quantile_draws:
        raise PayloadTooLargeError(
            f"quantiles of {n_samples:,} draws of {n_genes:,} genes need {n_genes * n_samples:,} "
            f"draws of a cell, above the largest allowed, {limits.max_quantile_draws:,}",
            "ask for fewer draws or name out_genes",
        )

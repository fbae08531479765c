from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from rayvaec.errors import ConfigError, RequestError
from rayvaec.serve.limits import (
    Gate,
    Limits,
    check_cost,
    check_dense,
    check_quantiles,
    read_body,
)
from rayvaec.serve.wire import ARROW, H5AD, JSON

LIMITS = Limits(
    max_cells=100,
    max_cost=10_000,
    max_json_cost=1_000,
    max_json_values=50,
    max_h5ad_cost=2_000,
    max_h5ad_layers=7,
    max_quantile_draws=60,
)


@pytest.mark.parametrize("name", ["max_body_bytes", "max_cost", "max_requests", "timeout_s"])
@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_limits_are_positive(name, value):
    with pytest.raises(ConfigError, match=f"the limit {name} is"):
        Limits(**{name: value})


@pytest.mark.parametrize(
    ("size", "answer", "words"),
    [
        ((0, 10, 1), ARROW, "no cells"),
        ((101, 1, 1), ARROW, "101 cells are above the largest number a request, 100"),
        ((10, 100, 11), ARROW, r"10 \* 100 \* 11 = 11,000, above the largest allowed, 10,000"),
        ((10, 100, 2), JSON, "above the largest allowed, 1,000; .*arrow.stream for up to 10,000"),
        ((10, 100, 3), H5AD, "above the largest allowed, 2,000; .*arrow.stream for up to 10,000"),
        ((1, 1, 8), H5AD, "8 draws a cell would be as many layers, above the largest number, 7"),
    ],
)
def test_a_cost_above_the_limit_is_refused(size, answer, words):
    with pytest.raises(RequestError, match=words) as caught:
        check_cost(*size, LIMITS, answer)
    assert caught.value.status == (422 if size[0] == 0 else 413)


def test_a_cost_at_the_limit_is_accepted():
    check_cost(10, 100, 10, LIMITS, ARROW)
    check_cost(10, 100, 1, LIMITS, JSON)
    check_cost(10, 100, 2, LIMITS, H5AD)
    check_dense(50, LIMITS, JSON)
    check_dense(2_000, LIMITS, H5AD)
    check_dense(10**9, LIMITS, ARROW)
    with pytest.raises(RequestError, match="2,001 numbers, above the largest in h5ad, 2,000"):
        check_dense(2_001, LIMITS, H5AD)
    with pytest.raises(RequestError, match="51 numbers, above the largest in JSON, 50"):
        check_dense(51, LIMITS, JSON)


def test_quantiles_over_too_many_draws_are_refused():
    check_quantiles(10, 6, LIMITS)
    with pytest.raises(RequestError, match="7 draws of 10 genes need 70 .*allowed, 60") as caught:
        check_quantiles(10, 7, LIMITS)
    assert caught.value.status == 413


def read(chunks: list[bytes], length: str | None = None) -> tuple[bytes | RequestError, int]:
    """Read a body of at most 10 bytes; also tell how many chunks were taken."""
    taken = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal taken
        for chunk in chunks:
            taken += 1
            yield chunk

    try:
        return asyncio.run(read_body(body(), length, 10)), taken
    except RequestError as error:
        return error, taken


def test_a_body_at_the_limit_is_read():
    assert read([b"12345", b"", b"67890"], "10") == (b"1234567890", 3)
    assert read([b"12345"], "nonsense") == (b"12345", 1)


def test_a_body_is_given_up_as_soon_as_it_is_too_large():
    error, taken = read([b"12345"] * 1000)
    assert (error.status, taken) == (413, 3)
    assert "the largest allowed is 10" in error.detail


def test_a_body_that_says_it_is_too_large_is_not_read():
    error, taken = read([b"12345"], "11")
    assert (error.status, taken) == (413, 0)


def test_the_gate_turns_away_who_finds_no_place():
    gate = Gate(2)
    with gate.enter():
        with gate.enter():
            with (
                pytest.raises(RequestError, match="2 requests are at work") as caught,
                gate.enter(),
            ):
                pass
            assert caught.value.status == 429
            assert 1 <= gate.retry_after <= 60
        with gate.enter():
            pass


def test_a_failed_request_gives_its_place_back():
    gate = Gate(1)
    for _ in range(3):
        with pytest.raises(KeyError), gate.enter():
            raise KeyError
    with gate.enter():
        pass

from __future__ import annotations

import pytest

from rayvaec.errors import ConfigError, RequestError
from rayvaec.protocol import ARROW, H5AD, JSON
from rayvaec.serving.middleware.limits import Limits, check_cost, check_dense, check_quantiles

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


def test_a_body_at_its_limit_can_be_held():
    with pytest.raises(ConfigError, match="max_body_bytes is 101, above max_held_bytes, 100"):
        Limits(max_body_bytes=101, max_held_bytes=100)
    assert Limits(max_body_bytes=100, max_held_bytes=100).max_held_bytes == 100


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

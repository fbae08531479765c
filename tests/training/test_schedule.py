from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from rayvaec.training.config import TrainConfig
from rayvaec.training.schedule import kl_weight, learning_rate, noise_seed


def test_cosine_goes_from_the_peak_to_the_end() -> None:
    config = TrainConfig(lr=1e-2, lr_end=0.1, lr_warmup_steps=0)
    rates = [learning_rate(config, step, 100) for step in range(101)]
    assert rates[0] == 1e-2
    assert rates[50] == pytest.approx(1e-2 * (0.1 + 0.9 / 2))
    assert rates[100] == pytest.approx(1e-3)
    assert all(a > b for a, b in pairwise(rates))
    assert learning_rate(config, 200, 100) == rates[100]


def test_constant_stays() -> None:
    config = TrainConfig(lr=1e-2, lr_schedule="constant", lr_warmup_steps=0)
    assert {learning_rate(config, step, 10) for step in range(20)} == {1e-2}


def test_the_rate_rises_to_the_course_it_would_have_without_a_warm_up() -> None:
    for schedule in ("cosine", "constant"):
        config = TrainConfig(lr=1e-2, lr_schedule=schedule, lr_warmup_steps=4)
        rates, courses = (
            [learning_rate(each, step, 100) for step in range(101)]
            for each in (config, replace(config, lr_warmup_steps=0))
        )
        shares = [rate / course for rate, course in zip(rates, courses, strict=True)]
        assert shares == pytest.approx([0.25, 0.5, 0.75] + [1.0] * 98)


@pytest.mark.parametrize(
    ("batch_size", "rate"), [(128, 5e-3), (512, 1e-2), (32, 2.5e-3), (65_536, 2e-2)]
)
def test_the_default_rate_grows_with_the_root_of_the_minibatch(
    batch_size: int, rate: float
) -> None:
    config = TrainConfig(batch_size=batch_size)
    assert config.peak_lr == config.resolved(1000).lr == pytest.approx(rate)
    assert TrainConfig(batch_size=batch_size, lr=1e-4).peak_lr == 1e-4


def test_kl_weight_rises_over_epochs() -> None:
    config = TrainConfig(kl_warmup_epochs=2.5)
    weights = [kl_weight(config, step, 4, 12) for step in range(12)]
    assert weights[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert weights[10:] == [1.0, 1.0]


@pytest.mark.parametrize(("total", "warmup"), [(1000, 10), (16, 4), (3, 1)])
def test_kl_weight_rises_over_steps_but_no_more_than_a_quarter(total: int, warmup: int) -> None:
    config = TrainConfig(kl_warmup_steps=10)
    weights = [kl_weight(config, step, 1, total) for step in range(12)]
    assert weights == pytest.approx([min((step + 1) / warmup, 1) for step in range(12)])


def test_without_warm_up_the_kl_weight_is_one() -> None:
    assert kl_weight(TrainConfig(kl_warmup_steps=0), 0, 10, 100) == 1.0


def test_noise_seeds_differ_and_stay() -> None:
    seeds = {noise_seed(a, b) for a in range(20) for b in range(20)}
    assert len(seeds) == 400
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert noise_seed(0, "weights") == noise_seed(0, "weights") == 7388263408636359099

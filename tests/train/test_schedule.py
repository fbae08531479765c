from __future__ import annotations

from itertools import pairwise

import pytest

from rayvaec.train.config import TrainConfig
from rayvaec.train.schedule import kl_weight, learning_rate, noise_seed


def test_cosine_goes_from_the_peak_to_the_end() -> None:
    config = TrainConfig(lr=1e-2, lr_end=0.1)
    rates = [learning_rate(config, step, 100) for step in range(101)]
    assert rates[0] == 1e-2
    assert rates[50] == pytest.approx(1e-2 * (0.1 + 0.9 / 2))
    assert rates[100] == pytest.approx(1e-3)
    assert all(a > b for a, b in pairwise(rates))
    assert learning_rate(config, 200, 100) == rates[100]


def test_constant_stays() -> None:
    config = TrainConfig(lr=1e-2, lr_schedule="constant")
    assert {learning_rate(config, step, 10) for step in range(20)} == {1e-2}


def test_kl_weight_rises_over_the_warm_up() -> None:
    config = TrainConfig(kl_warmup_epochs=2.5)
    weights = [kl_weight(config, step, 4) for step in range(12)]
    assert weights[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert weights[10:] == [1.0, 1.0]


def test_without_warm_up_the_kl_weight_is_one() -> None:
    assert kl_weight(TrainConfig(kl_warmup_epochs=0.0), 0, 10) == 1.0


def test_noise_seeds_differ_and_stay() -> None:
    seeds = {noise_seed(a, b) for a in range(20) for b in range(20)}
    assert len(seeds) == 400
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert noise_seed(0, "weights") == noise_seed(0, "weights") == 7388263408636359099

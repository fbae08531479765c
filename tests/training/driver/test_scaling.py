from __future__ import annotations

import pytest

from rayvaec.errors import ConfigError
from rayvaec.training.config import TrainConfig
from rayvaec.training.driver.scaling import share_of_cpus
from rayvaec.training.worker_range import split_range, workers_text


@pytest.mark.parametrize(
    ("nodes", "num_workers", "use_gpu", "cpus"),
    [
        ([(2, 0)], 1, False, 2),
        ([(2, 0)], 2, False, 1),
        ([(2, 0)], 3, False, 1),
        ([(7, 0), (4, 0)], 3, False, 3),
        ([(64, 0)], 2, False, 8),
        ([(16, 2), (64, 0)], 2, True, 8),
        ([(4, 4)], 4, True, 1),
        ([], 2, False, 1),
    ],
)
def test_cpus_are_shared_evenly(
    nodes: list[tuple[float, float]], num_workers: int, use_gpu: bool, cpus: int
) -> None:
    assert share_of_cpus(nodes, num_workers, use_gpu) == cpus


@pytest.mark.parametrize(
    ("nodes", "use_gpu", "cpus"),
    [
        ([(4, 0)], False, 1),  # room for four of the eight, and nodes like this one may come
        ([(16, 0), (16, 0)], False, 4),
        ([(64, 0)], False, 8),
        ([(16, 4)], True, 4),
        ([(1, 0)], False, 1),
    ],
)
def test_a_range_gets_the_share_of_what_fits(
    nodes: list[tuple[float, float]], use_gpu: bool, cpus: int
) -> None:
    assert share_of_cpus(nodes, 8, use_gpu, fewest=2) == cpus


def test_a_range_stands_for_two_settings() -> None:
    assert split_range({"num_workers": " 2 - 8 "}) == {"num_workers": 8, "min_workers": 2}
    assert split_range({"num_workers": 4}) == {"num_workers": 4, "min_workers": None}
    saved = {"num_workers": 8, "min_workers": 2}
    assert split_range(saved) == saved
    assert split_range({"lr": 1}) == {"lr": 1}


def test_a_range_is_read_wherever_settings_are() -> None:
    ranged = TrainConfig.from_json({"num_workers": "2-8"})
    assert (ranged.fewest_workers, ranged.num_workers) == (2, 8)
    assert TrainConfig.from_options(None, ["num_workers=2-8"]) == ranged
    assert TrainConfig.from_options(num_workers="2-8") == ranged
    assert TrainConfig.from_json(ranged.to_json()) == ranged
    assert TrainConfig(num_workers=4).fewest_workers == 4


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("8-2", "min_workers=8 is more than num_workers=2: a range is written as"),
        ("2..8", "num_workers='2..8' is not a whole number"),
        ("2-17", "num_workers=17 is more than lanes=16"),
        ("0-2", "min_workers=0 is too small"),
    ],
)
def test_a_range_that_cannot_be_is_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        TrainConfig.from_options(num_workers=text)


def test_workers_are_counted_in_words() -> None:
    assert workers_text(1, 1) == "1 worker"
    assert workers_text(3, 3) == "3 workers"
    assert workers_text(2, 8) == "2 to 8 workers"

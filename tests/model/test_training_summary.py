from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rayvaec.errors import ModelError
from rayvaec.model.saved import read_model, save_model
from rayvaec.model.training_summary import COUNT_EDGES, SUMMARY, TrainingSummary, read_summary
from rayvaec.model.vaec import VAEC


@pytest.fixture
def summary():
    rng = np.random.default_rng(0)
    return TrainingSummary(
        cells=np.array([3, 0]),
        library=rng.random((2, 101), np.float32),
        mean=np.array([[1, 0], [50, 0], [9, 0]], np.float32),
        histogram=rng.integers(0, 2**16, (3, 2, len(COUNT_EDGES)), dtype=np.uint16),
    )


@pytest.fixture
def model(tmp_path):
    save_model(tmp_path / "model", VAEC(3, 2, n_hidden=4), {"genes": ["a", "b", "c"]}, {})
    return tmp_path / "model"


def test_it_comes_back_and_is_no_part_of_the_models_identity(model, summary):
    before = read_model(model)
    assert before.summary is None
    for content in (replace(summary, cells=np.array([1, 1])), summary):
        content.save(model)
    after = read_model(model)
    assert after.hash == before.hash
    for name, array in vars(summary).items():
        assert np.array_equal(getattr(after.summary, name), array), name
    assert sorted(path.name for path in model.iterdir()) == [
        "config.json",
        "model.safetensors",
        "provenance.json",
        "registry.json",
        "summary.safetensors",
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"cells": np.zeros(3, np.int64)},
        {"mean": np.zeros((4, 2), np.float32)},
        {"mean": np.zeros((3, 2), np.float64)},
        {"histogram": np.zeros((3, 2, 4), np.uint16)},
    ],
)
def test_another_models_summary_is_refused(model, summary, changes):
    replace(summary, **changes).save(model)
    with pytest.raises(ModelError, match="no summary of 3 genes and 2 labels.*remove that file"):
        read_model(model)


def test_a_damaged_file_is_refused(model, summary):
    summary.save(model)
    whole = (model / SUMMARY).read_bytes()
    for part in (b"", whole[:50], whole[:-1], b"x" * 500):
        (model / SUMMARY).write_bytes(part)
        with pytest.raises(ModelError, match="summary.safetensors is damaged"):
            read_summary(model, 3, 2)


def test_the_genes_that_differ_most_come_first(summary):
    mean = np.array([[5, 5, 0], [1, 90, 0], [0, 0, 0], [2, 4, 0]], np.float32)
    two = replace(summary, cells=np.array([9, 9, 0]), mean=mean)
    assert two.telling_genes(3) == [1, 3, 0]
    one = replace(two, cells=np.array([0, 9, 0]))
    assert one.telling_genes(9) == [1, 0, 3, 2]

from __future__ import annotations

import logging
import shutil

from rayvaec.data.store.open import open_store
from rayvaec.model.training_summary import SUMMARY
from rayvaec.training.export import save_summaries


def test_a_model_without_a_summary_is_no_failure(store_path, model_path, tmp_path, caplog):
    shutil.copytree(store_path, tmp_path / "store")
    shutil.copytree(model_path, tmp_path / "run" / "model")
    store = open_store(tmp_path / "store")
    for file in (tmp_path / "store" / "dataset_0" / "X" / "data" / "c").rglob("*"):
        if file.is_file():
            file.unlink()
    with caplog.at_level(logging.WARNING, "rayvaec"):
        save_summaries(tmp_path / "run", store)
    assert "no summary of the training data" in caplog.text
    assert "dataset_0/X/data" in caplog.text
    assert not (tmp_path / "run" / "model" / SUMMARY).exists()

"""Formats of bulk outputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from rayvaec.inference.bulk import formats


def test_csv_holds_no_formulas(tmp_path: Path) -> None:
    names = ["=1+1", "+a", "-b", "@c", "\td", "\re", "plain", "a=\rb"]
    table = pd.DataFrame(
        {"group1": pd.Categorical(names), "comparison": names, "lfc_mean": np.arange(8) - 3.5},
        index=pd.Index(names, name="gene"),
    )
    before = table.copy()
    formats.write_table(tmp_path / "de.csv", table)
    written = pd.read_csv(tmp_path / "de.csv")
    expected = [f"'{name}" for name in names[:6]] + names[6:]
    for column in ("gene", "group1", "comparison"):
        assert written[column].tolist() == expected
    assert written["lfc_mean"].tolist() == table["lfc_mean"].tolist()
    assert table.equals(before)
    formats.write_table(tmp_path / "de.parquet", table)
    assert pd.read_parquet(tmp_path / "de.parquet").index.tolist() == names

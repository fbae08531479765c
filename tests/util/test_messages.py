from __future__ import annotations

from rayvaec.util.messages import join_names, suggest


def test_long_lists_are_cut():
    assert join_names([]) == "none"
    assert join_names(["a", "b"], 2) == "a, b"
    assert join_names((str(i) for i in range(1203)), 3) == "0, 1, 2 and 1,200 more"


def test_the_nearest_names_come_first():
    known = [f"column_{i}" for i in range(20)] + ["cell_type"]
    assert suggest("celltype", known, 3).startswith("cell_type, column_0, column_1 and 18 more")
    assert suggest("zzz", ["a", "b"]) == "a, b"

from __future__ import annotations

from rayvaec.util.messages import choices, listing


def test_long_lists_are_cut():
    assert listing([]) == "none"
    assert listing(["a", "b"], 2) == "a, b"
    assert listing((str(i) for i in range(1203)), 3) == "0, 1, 2 and 1,200 more"


def test_the_nearest_names_come_first():
    known = [f"column_{i}" for i in range(20)] + ["cell_type"]
    assert choices("celltype", known, 3).startswith("cell_type, column_0, column_1 and 18 more")
    assert choices("zzz", ["a", "b"]) == "a, b"

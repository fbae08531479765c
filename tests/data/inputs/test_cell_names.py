from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rayvaec.data.inputs.cell_names import UniqueNames, name_hashes

NAMES = st.lists(st.sampled_from(["A", "B", "A-1", "A-2", "A-1-1", "A-3", "-1", ""]), max_size=40)


def test_repetitions_get_a_number_that_is_free():
    names = ["A", "A-1", "A", "B", "A", "A-1"]
    unique = UniqueNames(name_hashes(names))
    assert unique.n_renamed() == 3
    # A-1 is taken by a cell of that name; the period of three steps over it.
    assert unique.rename(names, 0) == ["A", "A-1", "A-4", "B", "A-2", "A-1-1"]


@given(NAMES, st.integers(1, 7))
def test_names_become_unique_whatever_the_blocks(names, block):
    unique = UniqueNames(name_hashes(names))
    renamed = []
    for start in range(0, len(names), block):
        renamed += unique.rename(names[start : start + block], start)
    assert renamed == unique.rename(names, 0)
    assert len(set(renamed)) == len(names)
    first = [names.index(name) == row for row, name in enumerate(names)]
    assert [a == b for a, b in zip(names, renamed, strict=True)] == first
    assert unique.n_renamed() == len(names) - sum(first)

from __future__ import annotations

from rayvaec.data.prepare.pipeline import PrepareConfig, prepare
from rayvaec.data.store.describe import describe_store
from rayvaec.data.store.open import open_store


def test_a_store_is_described(write_input, counts, tmp_path):
    path = write_input(counts * 0.5, obs={"donor": ["x", "y"] * 15}, layers={"counts": counts})
    config = PrepareConfig("cell_type", batch_key="donor", layer="counts", seed=3)
    manifest = prepare([path], tmp_path / "store", config)
    text = describe_store(open_store(tmp_path / "store"))
    zeros = (counts == 0).mean()
    n_bytes = sum(p.stat().st_size for p in (tmp_path / "store").rglob("*") if p.is_file())
    assert text.splitlines() == [
        f"store {tmp_path / 'store'}",
        "  cells    30: 27 for training, 3 for validation, shuffled with seed 3",
        "  genes    12: g0, g1, g2 and 9 more",
        f"  counts   {counts.sum():,}: {counts.mean() * 12:,.0f} a cell, {zeros:.1%} zeros",
        "  labels   3 in cell_type: type 0 (10), type 1 (10), type 2 (10)",
        "  batches  2 in donor: x, y",
        f"  stored   {n_bytes / 1000:.3g} kB in 1 partition, {n_bytes / 30:,.0f} bytes a cell",
        f"  written  {manifest.created} by rayvaec {manifest.rayvaec_version}",
        f"  from     {path} (30 cells, 12 genes, layer counts)",
    ]


def test_many_labels_and_partitions_stay_few_lines(write_input, counts, tmp_path):
    path = write_input(counts, labels=[f"t{row}" for row in range(30)])
    prepare([path], tmp_path / "store", PrepareConfig("cell_type", partition_elements=20))
    text = describe_store(open_store(tmp_path / "store"))
    assert "and 20 more" in text
    assert "partitions, " in text
    assert len(text.splitlines()) == 8

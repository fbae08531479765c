from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from scipy import sparse

from rayvaec.data.inputs.reader import Input
from rayvaec.data.prepare import memory
from rayvaec.data.prepare.gene_selection import columns_of, share_gene_names
from rayvaec.data.prepare.memory import (
    Budget,
    machine_memory,
    parse_bytes,
    partition_bytes,
    plan_memory,
    show_bytes,
)
from rayvaec.data.prepare.partitions import CountsDtypes
from rayvaec.data.prepare.pipeline import PrepareConfig, prepare
from rayvaec.data.registry import Registry
from rayvaec.errors import ConfigError

DTYPES = CountsDtypes(np.dtype("u2"), np.dtype("u2"))
MIB = 2**20


@pytest.mark.parametrize(
    ("text", "size"),
    [("4G", 2**32), ("512M", 2**29), ("1.5 GiB", 3 * 2**29), ("900kb", 900 * 1024), ("7", 7)],
)
def test_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1G", "0", "4 apples", "1e9"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ConfigError, match="`memory` is .*; give a size such as 4G"):
        parse_bytes(text)


def test_sizes_are_shown_as_they_are_read():
    for size in (1, 300 * MIB, 300 * MIB + 1, 20 * 2**30 + 1):
        assert size <= parse_bytes(show_bytes(size)) <= size + 2**30


def test_a_limit_of_the_control_group_counts(tmp_path, monkeypatch):
    limits = [tmp_path / "a", tmp_path / "b", tmp_path / "nothing"]
    limits[0].write_text("max\n")
    limits[1].write_text("123456\n")
    monkeypatch.setattr(memory, "_cgroup_limits", lambda: limits)
    assert machine_memory() == 123456
    limits[1].write_text(str(2**80))
    assert machine_memory() == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_the_least_that_works_is_said_and_works(write_input, counts, tmp_path):
    path = write_input(counts)
    config = PrepareConfig("cell_type", memory=50 * MIB)
    with pytest.raises(ConfigError) as caught:
        prepare([path], tmp_path / "store", config)
    assert "`memory` is 50M, too little for 30 cells with up to" in caught.value.detail
    assert sorted(tmp_path.iterdir()) == [path]
    least = parse_bytes(re.search(r"use `memory=(\w+)` or more", caught.value.fix)[1])
    with pytest.raises(ConfigError, match="too little"):
        prepare([path], tmp_path / "store", replace(config, memory=least - 60 * MIB))
    prepare([path], tmp_path / "store", replace(config, memory=least + 10 * MIB))


@pytest.mark.parametrize("form", ["csr", "csc", "dense"])
def test_wider_rows_need_more(write_input, tmp_path, form):
    x = np.zeros((3, 200_000), "f4")
    x[1] = 1
    x[:, 0] = 1
    config = PrepareConfig("cell_type", memory=2**32)
    with Input(write_input(x, form=form)) as source:
        assert source.longest_row == 200_000
        assert plan_memory(config, [source], 1).block_elements >= 200_000
        with pytest.raises(ConfigError, match="3 cells with up to 200,000 values each"):
            plan_memory(replace(config, memory=memory.resident() + 90 * MIB), [source], 1)


def test_inputs_share_the_names_of_their_genes(write_input):
    genes = [f"ENSG{gene:011d}" for gene in range(20_000)]
    x = np.ones((2, 20_000), "f4")
    paths = [
        write_input(x, "a.h5ad", genes=genes),
        write_input(x[:, 1:], "b.h5ad", genes=genes[1:]),
    ]
    config = PrepareConfig("cell_type", memory=MIB)
    needed = []
    for copies in (1, 40):
        sources = [Input(path) for path in paths for _ in range(copies)]
        n_genes = share_gene_names(sources)
        assert n_genes == 20_000
        assert len({id(source.genes) for source in sources}) == 2
        assert sources[-1].genes[0] is sources[0].genes[1]
        assert [source.genes for source in sources[::copies]] == [genes, genes[1:]]
        registry = Registry(tuple(genes), ("T",), "cell_type")
        columns = columns_of(registry, sources)
        assert len({id(column) for column in columns}) == 2
        np.testing.assert_array_equal(columns[-1], np.arange(1, 20_000))
        with pytest.raises(ConfigError, match="too little") as caught:
            plan_memory(config, sources, n_genes)
        needed.append(parse_bytes(re.search(r"`memory=(\w+)` or more", caught.value.fix)[1]))
    assert needed[1] < needed[0] + 16 * MIB  # without sharing: 600 MiB


def test_partitions_are_halved_only_where_one_does_not_fit():
    large = Budget(free=2**33, block_elements=1, partition_elements=64_000_000)
    assert large.partition_size(DTYPES, 10**6, 10**9) == 64_000_000
    small = replace(large, free=300 * MIB)
    size = small.partition_size(DTYPES, 10**6, 10**9)
    assert size in (64_000_000 // 2**k for k in range(7))
    assert partition_bytes(size, DTYPES, 1000) <= 300 * MIB
    assert partition_bytes(size * 2, DTYPES, 1000) > 300 * MIB
    # A store that is small altogether is one partition, whatever the limit says.
    assert small.partition_size(DTYPES, 10**3, 10**6) == 64_000_000
    assert replace(large, free=0).partition_size(DTYPES, 10**6, 10**9) == 1_000_000


def test_fewer_workers_where_memory_is_short():
    each = memory.WORKER + partition_bytes(10**7, DTYPES, 1000)
    for free, workers in ((10 * each, 4), (2.5 * each, 2), (0.1 * each, 1)):
        room = Budget(int(free), 1, 1)
        assert room.workers(4, 10**7, DTYPES, 1000) == workers


# The kernel's own record of this process; ru_maxrss would count its parent's memory too.
PEAK = """
import sys
from rayvaec.cli import main
code = main()
with open("/proc/self/status") as status:
    print(next(line.split()[1] for line in status if line.startswith("VmHWM")))
sys.exit(code)
"""


@pytest.mark.parametrize("form", ["csr", "csc", "dense"])
def test_the_peak_is_within_the_budget(write_input, tmp_path, form):
    rng = np.random.default_rng(0)
    shape = (15_000, 400) if form == "dense" else (100_000, 400)
    x = sparse.random_array(shape, density=0.2, rng=rng, dtype="f4", format="csr")
    x.data[:] = rng.integers(1, 100, x.nnz)
    if form == "dense":
        x = x.toarray() + 1  # every value is stored
    path = write_input(x.astype("f4"), form=form, labels=["t"] * x.shape[0])
    command = [sys.executable, "-W", "error", "-c", PEAK, "prepare", str(path)]
    command += ["--out", str(tmp_path / "store"), "--labels-key", "cell_type", "--memory", "400M"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert ended.returncode == 0, ended.stderr
    peak = int(ended.stdout.split()[-1]) * 1024
    assert peak < 400 * MIB, f"{peak / MIB:.0f} MiB"

"""Paths on a cluster of several nodes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rayvaec.cluster import check_job_paths
from rayvaec.errors import ConfigError

SCRIPT = """
import logging, os, sys
from pathlib import Path

from rayvaec.cluster import require_token

require_token()
import ray
from ray.cluster_utils import Cluster

from rayvaec.errors import ConfigError
from rayvaec.cluster import check_seen

shared = Path(sys.argv[1])
cluster = Cluster(
    initialize_head=True,
    head_node_args={"num_cpus": 1, "include_dashboard": False, "object_store_memory": 80 * 2**20},
)
cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)
ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
try:
    check_seen([shared], [shared / "new" / "out.zarr"])
    print("seen", sorted(path.name for path in shared.iterdir()))
    # An open file of this process is what the processes on the nodes do not see.
    own = Path(f"/proc/self/fd/{os.dup2(os.open(shared / 'data', os.O_RDONLY), 900)}")
    try:
        check_seen([shared, own])
    except ConfigError as error:
        print("refused", error)
finally:
    ray.shutdown()
    cluster.shutdown()
"""


@pytest.mark.ray
def test_a_path_that_a_node_does_not_see_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").touch()
    environment = {name: v for name, v in os.environ.items() if not name.startswith("RAY_AUTH")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        env={**environment, "RAY_USAGE_STATS_ENABLED": "0"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    seen, refused = done.stdout.splitlines()
    assert seen == "seen ['data']"  # no probe is left behind
    assert refused.startswith("refused node ")
    assert "does not see /proc/self/fd/" in refused
    assert refused.endswith("; put it on a filesystem that all nodes share")


def test_a_url_is_not_taken_for_a_path() -> None:
    check_job_paths([Path("store"), Path("/a/store"), Path("C:not/a/url"), Path()])
    with pytest.raises(ConfigError, match=r"^s3://bucket/store is a URL, and only the store"):
        check_job_paths([Path("s3://bucket/store")])

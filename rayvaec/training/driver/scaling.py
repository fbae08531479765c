"""Number of workers (``4`` or ``2-8``) and their resources."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rayvaec.cluster import check_cpus, check_gpus, ray_nodes
from rayvaec.training.worker_range import workers_text

if TYPE_CHECKING:
    from rayvaec.training.config import TrainConfig

MOST_THREADS = 8
"""CPUs that a worker gets by default, at most: a VAEC's layers are too small to use more."""


def share_of_cpus(
    nodes: Sequence[tuple[float, float]], num_workers: int, use_gpu: bool = False, fewest: int = 0
) -> int:
    """Return the most CPUs that every worker can have on the nodes there are.

    Where not all workers fit now, the share is that of as many as do: nodes that come later are
    taken to be like those there are.

    Parameters
    ----------
    nodes : sequence of (float, float)
        CPUs and GPUs of each node.
    num_workers : int
        Workers to be placed.
    use_gpu : bool
        Whether each needs a GPU of its node as well.
    fewest : int
        Workers that are enough to begin with; 0: all.

    Returns
    -------
    int
        From 1 to `MOST_THREADS`; 1 also where they do not fit at all.
    """

    def places(cpus_each: int) -> int:
        return sum(int(min(cpus // cpus_each, gpus if use_gpu else cpus)) for cpus, gpus in nodes)

    placed = max(min(num_workers, places(1)), fewest or num_workers)
    fitting = [n for n in range(1, MOST_THREADS + 1) if places(n) >= placed]
    return max(fitting, default=1)


def check_resources(config: TrainConfig) -> int:
    """Refuse what Ray would wait for in vain.

    Call it with Ray connected, or to hear at once what a local Ray would not have.

    Parameters
    ----------
    config : TrainConfig
        How many workers, and whether on GPUs.

    Returns
    -------
    int
        CPUs of each worker.

    Raises
    ------
    ConfigError
        If the cluster has too few CPUs or GPUs for the fewest workers, and cannot come to more.
    """
    fewest = config.fewest_workers
    who = workers_text(fewest, fewest)
    if config.use_gpu:
        check_gpus(fewest, who)
    cpus = config.cpus_per_worker or share_of_cpus(
        ray_nodes(), config.num_workers, config.use_gpu, fewest
    )
    each = f" with {cpus} CPUs each" if cpus > 1 else ""
    check_cpus(fewest * cpus, f"{who}{each}")
    return cpus

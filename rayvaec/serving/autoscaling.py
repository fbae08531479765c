"""Number of replicas (``4`` or ``1-4``) and the CPU share of each."""

from __future__ import annotations

import re
from typing import Any

from rayvaec.errors import ConfigError

REQUESTS_A_REPLICA = 8
"""Requests at work or waiting, on the average, from which on Serve starts another replica: few
enough that a burst finds places, and more than the two that keep a replica's threads busy."""


def replica_range(given: int | str) -> tuple[int, int]:
    """Read a number of replicas, or a range of them.

    Parameters
    ----------
    given : int or str
        Such as 2, ``"2"`` or ``"1-4"``.

    Returns
    -------
    tuple of int
        Fewest and most.

    Raises
    ------
    ConfigError
        If it is neither, or allows for no replica.
    """
    ends = re.fullmatch(r"\s*(-?\d+)(?:\s*-\s*(\d+))?\s*", str(given))
    if ends is None:
        raise ConfigError(f"--num-replicas {given} is no number and no range", "give 2, or 1-4")
    fewest = int(ends[1])
    most = fewest if ends[2] is None else int(ends[2])
    if fewest < 1:
        raise ConfigError(f"--num-replicas={given} is below 1", "give at least 1")
    if most < fewest:
        raise ConfigError(f"--num-replicas={given} ends before it begins", "give such as 1-4")
    return fewest, most


def cpus_per_replica(most: int, use_gpu: bool, cpus: float, gpus: float) -> float:
    """Share out CPUs; refuse replicas that would wait for ever for theirs.

    Parameters
    ----------
    most : int
        Replicas that there may be at once.
    use_gpu : bool
        Whether each takes a GPU.
    cpus, gpus : float
        What there is.

    Returns
    -------
    float

    Raises
    ------
    ConfigError
        If there are fewer CPUs, or GPUs, than replicas.
    """
    if most > cpus:
        raise ConfigError(
            f"--num-replicas {most} needs as many CPUs and there are {cpus:g}",
            f"use {max(int(cpus), 1)} or fewer, or a larger cluster",
        )
    if use_gpu and most > gpus:
        raise ConfigError(
            f"--use-gpu with --num-replicas {most} needs as many GPUs, there are {gpus:g}",
            "use fewer replicas, or leave --use-gpu out",
        )
    return float(cpus // most)


def scaling(given: int | str) -> dict[str, Any]:
    """Return the deployment options that keep the number of replicas, or let it follow the load.

    Parameters
    ----------
    given : int or str
        As in `replica_range`.

    Returns
    -------
    dict
        ``num_replicas``, or ``autoscaling_config``.
    """
    fewest, most = replica_range(given)
    if fewest == most:
        return {"num_replicas": fewest}
    return {
        "autoscaling_config": {
            "min_replicas": fewest,
            "max_replicas": most,
            "target_ongoing_requests": REQUESTS_A_REPLICA,
            # Loading and compiling takes some seconds: come quickly, go slowly.
            "upscale_delay_s": 10.0,
            "downscale_delay_s": 300.0,
        }
    }

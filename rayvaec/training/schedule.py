"""Learning rate, KL weight and noise scale as functions of the step.

Nothing here has a state: a resumed run computes the same values, and no checkpoint needs them.
"""

from __future__ import annotations

import math
from hashlib import blake2b

from rayvaec.training.config import TrainConfig


def learning_rate(config: TrainConfig, step: int, total_steps: int) -> float:
    """Return the learning rate of a step.

    Parameters
    ----------
    config : TrainConfig
        ``peak_lr``, ``lr_warmup_steps``, ``lr_schedule`` and ``lr_end``.
    step : int
        Steps taken so far.
    total_steps : int
        Steps of the whole run, at which the cosine ends.

    Returns
    -------
    float
    """
    peak = config.peak_lr * _risen(step, config.lr_warmup_steps, total_steps)
    if config.lr_schedule == "constant":
        return peak
    done = min(step / max(total_steps, 1), 1.0)
    share = config.lr_end + (1 - config.lr_end) * 0.5 * (1 + math.cos(math.pi * done))
    return peak * share


def kl_weight(config: TrainConfig, step: int, steps_per_epoch: int, total_steps: int) -> float:
    """Return the weight of the Kullback-Leibler term in a step.

    Parameters
    ----------
    config : TrainConfig
        ``kl_warmup_epochs`` or ``kl_warmup_steps``.
    step : int
        Steps taken so far.
    steps_per_epoch : int
        Steps of an epoch.
    total_steps : int
        Steps of the whole run.

    Returns
    -------
    float
        In (0, 1].
    """
    if config.kl_warmup_epochs:
        return min((step + 1) / (config.kl_warmup_epochs * steps_per_epoch), 1.0)
    return _risen(step, config.kl_warmup_steps, total_steps)


def _risen(step: int, warmup: int, total_steps: int) -> float:
    """Return how much of a warm-up is over, in (0, 1]; a short run has a shorter one."""
    return min((step + 1) / max(min(warmup, total_steps // 4), 1), 1.0)


def noise_seed(*parts: int | str) -> int:
    """Return a seed for torch's generators: a hash of seed, step and rank, or the like.

    Parameters
    ----------
    *parts : int or str
        What the noise shall depend on.

    Returns
    -------
    int
        In [0, 2**63).
    """
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little") >> 1

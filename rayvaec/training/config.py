"""Configuration of a training run: fields, defaults, ranges, presets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

from rayvaec.training.settings import (
    find_problems,
    raise_problems,
    read_file,
    read_pairs,
    read_values,
    setting,
    unknown,
)
from rayvaec.training.worker_range import split_range

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "scvi": {
        "lr": 1e-3,
        "dispersion_lr": 1.0,
        "eps": 0.01,
        "weight_decay": 1e-6,
        "lr_schedule": "constant",
        "gradient_clip": None,
        "lr_warmup_steps": 0,
        "kl_warmup_steps": 0,
        "batch_size": 128,
        "start_from_counts": False,
    },
}
"""Named recipes; ``scvi`` is what scvi-tools trains CondSCVI with."""

SCVI_NAMES = {
    "n_epochs_kl_warmup": "kl_warmup_epochs is its name here",
    "n_steps_kl_warmup": "kl_warmup_steps is its name here",
    "learning_rate": "lr is its name here",
    "gradient_clip_val": "gradient_clip is its name here",
    "early_stopping_patience": "patience is its name here",
    "early_stopping": "patience is the number of epochs after which a run stops early, 0 for never",
    "early_stopping_monitor": "the validation ELBO is what patience looks at",
    "train_size": "give val_fraction, the share that is held out, to prepare",
    "validation_size": "give val_fraction, the share that is held out, to prepare",
    "reduce_lr_on_plateau": "lr_schedule is the course of the rate here",
    "plan_kwargs": "lr, weight_decay, kl_warmup_epochs and the like are settings of their own here",
    "accelerator": "use_gpu gives each worker a GPU",
    "devices": "num_workers is the number of processes, each with a GPU where use_gpu is set",
    "check_val_every_n_epoch": "validation follows every epoch",
    "gene_likelihood": "counts are negative binomial; generative is the form of the model",
}
"""Settings of scvi-tools by their names there, and what to give here."""

CELLS_PER_DEFAULT_RUN = 20_000
"""Training cells for which `DEFAULT_EPOCHS` is the default number of epochs."""
DEFAULT_EPOCHS = 50
FEWEST_EPOCHS, MOST_EPOCHS = 10, 400
DEFAULT_LR, CELLS_AT_DEFAULT_LR, MOST_DEFAULT_LR = 5e-3, 128, 2e-2


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a training run; `settings()` lists them with a line each.

    Raises
    ------
    ConfigError
        If values have a wrong type, are out of range or contradict each other. All problems are
        named at once.
    """

    n_hidden: int = setting(128, "width of hidden layers", low=1)
    n_latent: int = setting(5, "dimensions of z", low=1)
    n_layers: int = setting(2, "hidden layers of encoder and decoder", low=1)
    dropout_rate: float = setting(0.05, "share of hidden units dropped", low=0, high=0.95)
    log_variational: bool = setting(True, "the encoder reads log(1 + x)")
    generative: str = setting(
        "softplus",
        "form of the model; scvi-tools 1.4.1 on has softmax",
        choices=("softplus", "softmax"),
    )
    prior: str = setting(
        "normal", "prior of z; mog: a mixture per label, softmax alone", choices=("normal", "mog")
    )
    use_batches: bool = setting(True, "condition on the store's batches, where it has any")
    encode_covariates: bool = setting(False, "the encoder is told the batch too")
    weight_obs: bool = setting(False, "weight cells inversely to how common their label is")

    max_epochs: int | None = setting(
        None, "epochs at most; by default chosen from the number of cells", low=1, resumable=True
    )
    batch_size: int = setting(128, "cells in a minibatch over all workers", low=1)
    lr: float | None = setting(
        None, "peak learning rate of Adam; by default chosen from batch_size", above=0, high=1
    )
    dispersion_lr: float = setting(
        10.0, "learning rate of the genes' dispersions, relative", above=0, high=1000
    )
    lr_warmup_steps: int = setting(
        20, "steps over which the rate rises to its peak, a quarter of all at most", low=0
    )
    lr_schedule: str = setting("cosine", "course of the rate", choices=("cosine", "constant"))
    lr_end: float = setting(0.02, "rate at the end of the cosine, relative", low=0, high=1)
    eps: float = setting(1e-4, "epsilon of Adam", above=0, high=1)
    weight_decay: float = setting(0.0, "L2 penalty in Adam", low=0, high=1)
    gradient_clip: float | None = setting(30.0, "largest gradient norm; none: any", above=0)
    kl_warmup_epochs: float = setting(
        0.0, "epochs (or parts) over which the KL weight rises from 0 to 1", low=0
    )
    kl_warmup_steps: int = setting(
        300, "the same in steps, a quarter of all at most; without kl_warmup_epochs", low=0
    )
    start_from_counts: bool = setting(
        True, "start the output at the genes' mean shares, and dispersions at what the counts show"
    )
    patience: int = setting(
        20,
        "epochs without a better validation ELBO that end the run; 0: never",
        low=0,
        resumable=True,
    )
    seed: int = setting(0, "seed of weights, order and noise", low=0, high=2**63 - 1)

    lanes: int = setting(16, "lanes of the loader: more workers than that cannot be", low=1)
    block_rows: int = setting(256, "consecutive rows read together", low=1)
    buffer_rows: int = setting(16_384, "rows in the shuffle buffers of all lanes", low=1)
    prefetch: int = setting(2, "minibatches made ahead", low=1, resumable=True)
    val_cells: int | None = setting(None, "validation cells used; by default all", low=1)

    num_workers: int = setting(
        1, "data-parallel workers; 2-8: as many of them as there is room for", low=1, resumable=True
    )
    min_workers: int | None = setting(
        None, "workers that the run goes on with; by default all", low=1, resumable=True
    )
    use_gpu: bool = setting(False, "one GPU a worker", resumable=True)
    cpus_per_worker: int | None = setting(
        None, "CPUs and threads of a worker; by default an even share", low=1, resumable=True
    )
    max_failures: int = setting(
        3,
        "losses of workers survived between two checkpoints; -1: any number",
        low=-1,
        resumable=True,
    )
    max_wait: float = setting(
        600.0, "seconds for which a run waits for room for its workers", above=0, resumable=True
    )
    resize_seconds: float = setting(
        60.0, "seconds between looks for room for more workers", above=0, resumable=True
    )
    checkpoint_steps: int | None = setting(
        None, "steps between checkpoints within an epoch", low=1, resumable=True
    )
    checkpoint_seconds: float = setting(
        60.0, "seconds between checkpoints within an epoch", above=0, resumable=True
    )
    log_steps: int | None = setting(
        None, "steps between metrics records within an epoch", low=1, resumable=True
    )

    def __post_init__(self) -> None:
        raise_problems(_problems(asdict(self)))

    @classmethod
    def settings(cls) -> dict[str, str]:
        """Return each setting's name and what it is for."""
        return {item.name: item.metadata["about"] for item in fields(cls)}

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:
        """Return a named recipe, with changes.

        Parameters
        ----------
        name : str
            A key of `PRESETS`.
        **changes
            Settings that differ from the preset.

        Returns
        -------
        TrainConfig

        Raises
        ------
        ConfigError
            If there is no such preset, or a change cannot be used.
        """
        if name not in PRESETS:
            raise_problems([unknown("preset", name, PRESETS)])
        return cls.from_json({**PRESETS[name], **changes})

    def to_json(self) -> dict[str, Any]:
        """Return the settings as JSON values that `from_json` and ``--config`` read."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Build from JSON values.

        Parameters
        ----------
        values : Mapping
            Settings by name; the others keep their defaults.

        Returns
        -------
        TrainConfig

        Raises
        ------
        ConfigError
            If names are unknown or values cannot be used, all at once.
        """
        read, problems = read_values(cls, split_range(values), SCVI_NAMES)
        raise_problems(problems + _problems(asdict(cls()) | read))
        return cls(**read)

    @classmethod
    def from_options(
        cls,
        file: Path | None = None,
        settings: Sequence[str] = (),
        *,
        run: Path | None = None,
        **flags: Any,
    ) -> Self:
        """Put a configuration together from a file, ``key=value`` settings and flags.

        Parameters
        ----------
        file : Path, optional
            YAML or JSON with settings by name; ``RUN/config.json`` of an earlier run is one. The
            key ``preset`` names a recipe that the other settings change.
        settings : sequence of str
            ``key=value``, stronger than the file.
        run : Path, optional
            Folder of the run that is resumed: its configuration stands in for the defaults.
        **flags
            Settings by name, as strong as `settings`; None means not given.

        Returns
        -------
        TrainConfig

        Raises
        ------
        ConfigError
            Naming every problem at once, with the nearest valid name.
        """
        given, problems = read_pairs(settings, flags)
        given = split_range(given)
        if file is not None:
            from_file, file_problems = read_file(Path(file))
            given, problems = split_range(from_file) | given, file_problems + problems
        base = {} if run is None else read_config(run).to_json()
        recipe = given.pop("preset", "default")
        if recipe not in PRESETS:
            problems.append(unknown("preset", recipe, PRESETS))
        read, read_problems = read_values(cls, given, SCVI_NAMES)
        values = asdict(cls()) | base | PRESETS.get(recipe, {}) | read
        raise_problems(problems + read_problems + _problems(values))
        return cls(**values)

    def resolved(self, n_train: int) -> Self:
        """Fill in the number of epochs and the learning rate, where they were left open.

        Small data needs more epochs than an atlas: the default falls with the square root of the
        number of training cells, from 400 below 312 cells over 50 at 20,000 to 10 from 500,000.

        Parameters
        ----------
        n_train : int
            Training cells in the store.

        Returns
        -------
        TrainConfig
        """
        epochs = round(DEFAULT_EPOCHS * math.sqrt(CELLS_PER_DEFAULT_RUN / max(n_train, 1)))
        epochs = min(max(epochs, FEWEST_EPOCHS), MOST_EPOCHS)
        return replace(self, max_epochs=self.max_epochs or epochs, lr=self.peak_lr)

    @property
    def peak_lr(self) -> float:
        """The peak learning rate: `lr`, or by default one chosen from `batch_size`.

        `DEFAULT_LR` at a minibatch of 128, growing with its square root to `MOST_DEFAULT_LR`: a
        step of Adam is as long as the rate whatever the gradient, and larger minibatches take
        fewer of them, in directions with less noise.
        """
        by_size = DEFAULT_LR * math.sqrt(self.batch_size / CELLS_AT_DEFAULT_LR)
        return self.lr or min(by_size, MOST_DEFAULT_LR)

    @property
    def fewest_workers(self) -> int:
        """Workers without which the run does not go on."""
        return self.min_workers or self.num_workers

    def conflicts(self, other: Self) -> list[str]:
        """Return the settings in which a resumed run may not differ from `other` but does."""
        ours, theirs = (asdict(replace(each, lr=each.peak_lr)) for each in (self, other))
        return [
            f"{item.name}={ours[item.name]!r} (the run has {theirs[item.name]!r})"
            for item in fields(self)
            if not item.metadata["resumable"] and ours[item.name] != theirs[item.name]
        ]


def read_config(run: Path) -> TrainConfig:
    """Read the configuration that a run was started with.

    Parameters
    ----------
    run : Path
        A run folder.

    Returns
    -------
    TrainConfig

    Raises
    ------
    ConfigError
        If the folder has none, or it cannot be read.
    """
    values, problems = read_file(Path(run) / "config.json")
    raise_problems(problems)
    return TrainConfig.from_json(values)


def _problems(values: Mapping[str, Any]) -> list[str]:
    return find_problems(TrainConfig, values) or _contradictions(values)


def _contradictions(values: Mapping[str, Any]) -> list[str]:
    problems = []
    batch_size, lanes, workers = values["batch_size"], values["lanes"], values["num_workers"]
    if batch_size % lanes:
        below = batch_size // lanes * lanes
        nearest = min((n for n in (below, below + lanes) if n), key=lambda n: abs(n - batch_size))
        problems.append(
            f"batch_size={batch_size} is not divisible by lanes={lanes}: the nearest that is, "
            f"is {nearest}"
        )
    least = lanes * values["block_rows"]
    if values["buffer_rows"] < least:
        problems.append(
            f"buffer_rows={values['buffer_rows']} is too small: at least lanes * block_rows = "
            f"{least}"
        )
    if values["prior"] == "mog" and values["generative"] != "softmax":
        problems.append("prior='mog' needs generative='softmax'")
    if (values["min_workers"] or 1) > workers:
        problems.append(
            f"min_workers={values['min_workers']} is more than num_workers={workers}: a range "
            "is written as num_workers=2-8"
        )
    if workers > lanes:
        problems.append(
            f"num_workers={workers} is more than lanes={lanes}: use {lanes} workers or fewer, or "
            "more lanes in a new run"
        )
    return problems

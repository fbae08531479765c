"""Configuration of VAEC: validated, frozen, saved with the weights."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from difflib import get_close_matches
from typing import Any, Self

import numpy as np

from rayvaec.errors import ConfigError

_CHOICES = {
    "generative": ("softplus", "softmax"),
    "library": ("sum", "log"),
    "prior": ("normal", "mog"),
}


@dataclass(frozen=True)
class VAECConfig:
    """What a VAEC is built from.

    Numbers and truth values may be numpy's; None stands for an argument's default.

    Parameters
    ----------
    n_input : int
        Number of genes.
    n_labels : int
        Number of labels (cell types); 0 or 1 means that labels carry no information.
    n_hidden, n_latent, n_layers : int
        Width of the hidden layers, dimensions of z, and hidden layers of encoder and decoder.
    log_variational : bool
        Whether the encoder reads log(1 + x) instead of x.
    ct_weight : tuple of float, optional
        Weight of each label's cells in the loss; 1 by default.
    dropout_rate : float
        Share of hidden units dropped while training, in [0, 1).
    n_batch : int
        Number of experimental batches that the decoder is conditioned on.
    encode_covariates : bool
        Whether the encoder is conditioned on the batch too.
    generative : str
        ``"softplus"`` (scvi-tools 0.16 to 1.4.0) or ``"softmax"`` (1.4.1 on).
    library : str
        ``"sum"`` of a cell's counts, or its ``"log"`` (softplus models of scvi-tools before 0.16,
        whose decoder has no dropout).
    prior : str
        ``"normal"``, or ``"mog"``: a learned mixture of Gaussians per label (softmax form).
    num_classes_mog : int
        Components of that mixture.
    n_fine_labels : int, optional
        Number of fine labels that a classifier on z tells apart (softmax form).

    Raises
    ------
    ConfigError
        If a value is out of range, naming it and its range.
    """

    n_input: int
    n_labels: int = 0
    n_hidden: int = 128
    n_latent: int = 5
    n_layers: int = 2
    log_variational: bool = True
    ct_weight: tuple[float, ...] | None = None
    dropout_rate: float = 0.05
    n_batch: int = 0
    encode_covariates: bool = False
    generative: str = "softplus"
    library: str = "sum"
    prior: str = "normal"
    num_classes_mog: int = 10
    n_fine_labels: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and field.default is not MISSING:
                value = field.default
            object.__setattr__(self, field.name, _plain(field.name, str(field.type), value))
        self._check_ranges()
        self._check_choices()
        self._check_ct_weight()

    def _check_ranges(self) -> None:
        for name, low in (
            *(("n_input", 1), ("n_hidden", 1), ("n_latent", 1), ("n_layers", 1)),
            *(("n_labels", 0), ("n_batch", 0), ("num_classes_mog", 1), ("n_fine_labels", 2)),
        ):
            value = getattr(self, name)
            if value is None and name == "n_fine_labels":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ConfigError(
                    f"VAEC: {name}={value!r} is out of range", f"give a whole number >= {low}"
                )
        if not 0 <= self.dropout_rate < 1:
            raise ConfigError(
                f"VAEC: dropout_rate={self.dropout_rate!r} is out of range",
                "give a number in [0, 1)",
            )
        if self.encode_covariates and self.n_batch < 1:
            raise ConfigError(
                f"VAEC: encode_covariates=True with n_batch={self.n_batch}",
                "give n_batch >= 1 or encode_covariates=False",
            )

    def _check_choices(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"VAEC: {name}={getattr(self, name)!r} is unknown",
                    f"choose from {', '.join(choices)}",
                )
        softmax = self.generative == "softmax"
        for name, ours, needed in (
            ("library='log'", self.library == "log", "softplus"),
            ("prior='mog'", self.prior == "mog", "softmax"),
            ("n_fine_labels", self.n_fine_labels is not None, "softmax"),
        ):
            if ours and self.generative != needed:
                raise ConfigError(
                    f"VAEC: {name} does not go with generative={self.generative!r}",
                    f"use generative={needed!r}",
                )
        if softmax and self.n_batch < 1:
            raise ConfigError(
                f"VAEC: the softmax form embeds the batch and n_batch={self.n_batch}",
                "give n_batch >= 1",
            )
        if self.prior == "mog" and self.n_labels < 1:
            raise ConfigError(
                "VAEC: prior='mog' is a mixture per label and n_labels=0", "give n_labels >= 1"
            )

    def _check_ct_weight(self) -> None:
        if self.ct_weight is None:
            return
        if len(self.ct_weight) != self.n_labels:
            raise ConfigError(
                f"VAEC: ct_weight has {len(self.ct_weight)} values for n_labels={self.n_labels}",
                "give one weight a label",
            )
        for label, weight in enumerate(self.ct_weight):
            if not (math.isfinite(weight) and weight >= 0):
                raise ConfigError(
                    f"VAEC: ct_weight[{label}]={weight!r} is no weight", "give finite numbers >= 0"
                )

    def to_json(self) -> dict[str, Any]:
        """Return the arguments as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Build from JSON values; an unknown name is a ConfigError with the nearest valid one."""
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                near = get_close_matches(name, known, n=1)
                raise ConfigError(
                    f"VAEC has no argument {name!r}",
                    f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(known)}",
                )
        return cls(**values)


def _plain(name: str, kind: str, value: Any) -> Any:
    """Return an argument as Python's own type; numpy's and torch's numbers are taken as well."""
    try:
        if name == "ct_weight":
            return None if value is None else tuple(float(weight) for weight in value)
        if kind == "float":
            return float(_number(value))
        if kind == "bool":
            return _truth(value)
        # What is not a whole number is out of range, and refused as that.
        whole = kind.startswith("int") and not isinstance(value, bool)
        return operator.index(value) if whole else value
    except (TypeError, ValueError) as error:
        if kind.startswith("int"):
            return value
        what = {"float": "a number", "bool": "True or False"}.get(kind, "one number a label")
        raise ConfigError(f"VAEC: {name}={value!r} does not fit", f"give {what}") from error


def _number(value: Any) -> Any:
    if isinstance(value, bool | np.bool_ | str):
        raise TypeError
    return value


def _truth(value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise TypeError
    return bool(value)

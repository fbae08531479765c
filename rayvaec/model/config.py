"""The arguments of VAEC: validated, frozen, saved beside the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from typing import Any, Self

from rayvaec.errors import ConfigError


@dataclass(frozen=True)
class VAECConfig:
    """What a VAEC is built from.

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

    def __post_init__(self) -> None:
        for name, low in (
            *(("n_input", 1), ("n_hidden", 1), ("n_latent", 1), ("n_layers", 1)),
            *(("n_labels", 0), ("n_batch", 0)),
        ):
            value = getattr(self, name)
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
        self._check_ct_weight()

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
        values = dict(values)
        if values.get("ct_weight") is not None:
            values["ct_weight"] = tuple(float(weight) for weight in values["ct_weight"])
        return cls(**values)

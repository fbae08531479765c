"""Which columns of a store that rayvaec did not write hold labels and batches."""

from __future__ import annotations

from dataclasses import dataclass

from rayvaec.errors import ConfigError


@dataclass(frozen=True)
class ObsKeys:
    """Which obs columns of a foreign store are meant.

    Parameters
    ----------
    labels : str
        The column of cell types.
    batches : str, optional
        The column of experimental batches, where these are to be modelled.

    Raises
    ------
    ConfigError
        If both are the same column.
    """

    labels: str
    batches: str | None = None

    def __post_init__(self) -> None:
        if self.labels == self.batches:
            raise ConfigError(
                f"labels and batches are both read from obs column {self.labels!r}",
                "give another --batch-key or none",
            )

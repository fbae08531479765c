"""The streams of `rayvaec.kernels.keys` in torch's integers, on any device.

A GPU that draws its own noise need not wait for a processor to draw it and a bus to bring it. torch
has no arithmetic on unsigned words, but sums and products of int64 wrap to the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rayvaec.kernels import keys

_WORD = 2**64 - 1
_GOLDEN, _MIX_1, _MIX_2 = int(keys._GOLDEN), int(keys._MIX_1), int(keys._MIX_2)


class KeyedStreams:
    """Random streams of cells, one a seed and cell, for one purpose.

    Parameters
    ----------
    purpose : int
        What the numbers are for.
    seeds : Sequence[int]
        From 0 to 2**64 - 1.
    device : torch.device
        Where numbers are drawn.
    """

    def __init__(self, purpose: int, seeds: Sequence[int], device: torch.device) -> None:
        starts = [int(keys._INIT_0), int(keys._INIT_1)]
        words = [
            [_mix_number((_mix_number(start + purpose) ^ seed) + _GOLDEN) for seed in seeds]
            for start in starts
        ]
        self._words = torch.tensor(
            [[_signed(word) for word in row] for row in words], dtype=torch.int64, device=device
        ).view(2, len(seeds), 1)

    def keys(self, cells: Tensor, sample: Tensor) -> Tensor:
        """Absorb cell and sample, as `rayvaec.kernels.keys.stream_keys` does.

        Parameters
        ----------
        cells : Tensor[n_cells], int64
            Key of each cell.
        sample : Tensor[1], int64
            What else the numbers depend on.

        Returns
        -------
        Tensor[2, n_seeds, n_cells, 1], int64
            The two key words of every stream.
        """
        words = _mix((self._words ^ cells) + _signed(_GOLDEN))
        return _mix((words ^ sample) + _signed(_GOLDEN)).unsqueeze(-1)


def random_words(stream_keys: Tensor, steps: Tensor) -> Tensor:
    """Return numbers of every stream as 64 random bits.

    Parameters
    ----------
    stream_keys : Tensor[2, n_seeds, n_cells, 1], int64
        From `KeyedStreams.keys`.
    steps : Tensor[n], int64
        From `weyl_steps`.

    Returns
    -------
    Tensor[n_seeds, n_cells, n], int64
    """
    k0, k1 = stream_keys
    return _mix(k1 ^ _mix(k0 + steps))


def weyl_steps(numbers: Tensor) -> Tensor:
    """Return how far each of the given numbers is along a stream, for `random_words`."""
    return numbers.to(torch.int64) * _signed(_GOLDEN)


def normal_noise(stream_keys: Tensor, steps: Tensor) -> Tensor:
    """Return standard normal noise, as `rayvaec.kernels.keys.normal_noise` does.

    Parameters
    ----------
    stream_keys : Tensor[2, n_seeds, n_cells, 1], int64
        From `KeyedStreams.keys`.
    steps : Tensor[n], int64
        Of the numbers from 0 to an even n.

    Returns
    -------
    Tensor[n_seeds, n_cells, n], float32
        The same numbers but for the rounding of cosines and logarithms.
    """
    uniform = (_shift(random_words(stream_keys, steps), 12).double() + 0.5) * 2.0**-52
    radius = torch.sqrt(-2.0 * torch.log(uniform[..., 0::2]))
    angle = 2.0 * math.pi * uniform[..., 1::2]
    pairs = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), -1)
    return pairs.flatten(-2).float()


def _shift(word: Tensor, bits: int) -> Tensor:
    """Shift to the right, zeros coming in on the left."""
    return (word >> bits) & ((1 << (64 - bits)) - 1)


def _mix(word: Tensor) -> Tensor:
    word = (word ^ _shift(word, 30)) * _signed(_MIX_1)
    word = (word ^ _shift(word, 27)) * _signed(_MIX_2)
    return word ^ _shift(word, 31)


def _mix_number(word: int) -> int:
    word &= _WORD
    word = ((word ^ (word >> 30)) * _MIX_1) & _WORD
    word = ((word ^ (word >> 27)) * _MIX_2) & _WORD
    return word ^ (word >> 31)


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word

"""The random streams of `rayvaec.kernels.rng` in torch integer arithmetic, on any device.

A GPU that draws its own noise need not wait for a processor to draw it and a bus to bring it. torch
has no arithmetic on unsigned words, but sums and products of int64 wrap to the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rayvaec.kernels.rng import GOLDEN, INIT_0, INIT_1, MIX_1, MIX_2

_WORD = 2**64 - 1
_GOLDEN, _MIX_1, _MIX_2 = int(GOLDEN), int(MIX_1), int(MIX_2)


class KeyedStreams:
    """Random streams of cells, several a cell.

    Parameters
    ----------
    names : Sequence of (int, int)
        What the numbers of each stream are for, and its seed, from 0 to 2**64 - 1.
    device : torch.device
        Where numbers are drawn.
    """

    def __init__(self, names: Sequence[tuple[int, int]], device: torch.device) -> None:
        words = [
            _signed(_mix_number((_mix_number(int(start) + purpose) ^ seed) + _GOLDEN))
            for start in (INIT_0, INIT_1)
            for purpose, seed in names
        ]
        self._words = torch.tensor(words, device=device).view(2, len(names), 1)

    def words(self, cells: Tensor, sample: Tensor, steps: Tensor) -> Tensor:
        """Return numbers of every stream as 64 random bits.

        Parameters
        ----------
        cells : Tensor[n_cells], int64
            Key of each cell.
        sample : Tensor[1], int64
            What else the numbers depend on.
        steps : Tensor[n], int64
            Which ones, from `weyl_steps`.

        Returns
        -------
        Tensor[n_names, n_cells, n], int64
            Of the streams that `rayvaec.kernels.rng.stream_keys` gives.
        """
        absorbed = _mix((self._words ^ cells) + _signed(_GOLDEN))
        k0, k1 = _mix((absorbed ^ sample) + _signed(_GOLDEN)).unsqueeze(-1)
        return _mix(k1 ^ _mix(k0 + steps))


def weyl_steps(numbers: Tensor) -> Tensor:
    """Return how far numbers are along a stream, for `KeyedStreams.words`."""
    return numbers.to(torch.int64) * _signed(_GOLDEN)


def normal_noise(words: Tensor) -> Tensor:
    """Return standard normal noise, as `rayvaec.kernels.rng.normal_noise` does.

    Parameters
    ----------
    words : Tensor[..., n], int64
        The first numbers of streams, an even number of them.

    Returns
    -------
    Tensor[..., n], float32
        The same noise but for the rounding of cosines and logarithms.
    """
    uniform = (_shift(words, 12).double() + 0.5) * 2.0**-52
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

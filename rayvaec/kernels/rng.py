"""Counter-based random numbers keyed by (seed, cell key, sample).

Every row of draws has its own counter-based stream. Two 64-bit words, k0 and k1, are mixed from
(purpose, seed, key, sample); number i of the stream is ``mix(k1 ^ mix(k0 + i * golden))``, where
`mix` is the finaliser of splitmix64 (Steele, Lea & Flood 2014; constants: Stafford's variant 13).

Why this is sound: `mix` is a bijection of 64-bit words under which each input bit flips each output
bit with probability close to 1/2, and applied to a Weyl sequence once (that is splitmix64) it
passes BigCrush. Here it is applied twice, with key material between, as in the cipher of Even &
Mansour (1997). So a row's stream is a permutation of its own, chosen by 128 bits, and two rows do
not share a stretch of one long sequence at some offset, as they would with splitmix64 alone.
Absorbing one word at a time through a bijection keeps rows that differ in one word only from ever
sharing k0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from hashlib import blake2b
from typing import Any, NamedTuple, Self

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

from rayvaec.errors import ConfigError
from rayvaec.kernels.threads import run_all, spans, thread_count
from rayvaec.util.numba_cache import compiled

DRAWS = np.uint64(0x64726177)
NOISE = np.uint64(0x6E6F6973)
GAMMA = np.uint64(0x67616D6D)

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
MIX_2 = np.uint64(0x94D049BB133111EB)
INIT_0 = np.uint64(0x243F6A8885A308D3)  # digits of pi
INIT_1 = np.uint64(0x13198A2E03707344)
_S12 = np.uint64(12)
_S27 = np.uint64(27)
_S30 = np.uint64(30)
_S31 = np.uint64(31)


class Streams(NamedTuple):
    """What names the random streams of rows; from `check_streams`.

    Parameters
    ----------
    seed : uint64
        Of all rows.
    keys, samples : NDArray[n_rows] of uint64
        Each row's cell, and which of the cell's draws it is.
    """

    seed: np.uint64
    keys: NDArray[np.uint64]
    samples: NDArray[np.uint64]

    def of(self, rows: slice) -> Self:
        """Return the streams of some rows."""
        return self._replace(keys=self.keys[rows], samples=self.samples[rows])


@njit(inline="always")
def _mix(word: np.uint64) -> np.uint64:
    word = (word ^ (word >> _S30)) * MIX_1
    word = (word ^ (word >> _S27)) * MIX_2
    return word ^ (word >> _S31)


@njit(inline="always")
def stream_key(
    start: np.uint64, purpose: np.uint64, seed: np.uint64, key: np.uint64, sample: np.uint64
) -> np.uint64:
    """Absorb the four words that name a stream into one of its two key words."""
    word = _mix(start + purpose)
    word = _mix((word ^ seed) + GOLDEN)
    word = _mix((word ^ key) + GOLDEN)
    return _mix((word ^ sample) + GOLDEN)


@njit(inline="always")
def stream_keys(
    purpose: np.uint64, seed: np.uint64, key: np.uint64, sample: np.uint64
) -> tuple[np.uint64, np.uint64]:
    """Return the two key words of the stream named by (purpose, seed, key, sample)."""
    return (
        stream_key(INIT_0, purpose, seed, key, sample),
        stream_key(INIT_1, purpose, seed, key, sample),
    )


@njit(inline="always")
def uniform(k0: np.uint64, k1: np.uint64, number: np.uint64) -> float:
    """Return number `number` of stream (k0, k1), uniform on the open interval (0, 1).

    52 random bits and a half: neither 0 nor 1 can come out, so that every logarithm is finite.
    """
    word = _mix(k1 ^ _mix(k0 + number * GOLDEN))
    return (np.int64(word >> _S12) + 0.5) * 2.0**-52


@njit(inline="always")
def gene_stream(k0: np.uint64, k1: np.uint64, gene: np.uint64) -> tuple[np.uint64, np.uint64]:
    """Return the two key words of a stream that belongs to one gene of a row."""
    word = _mix((k0 ^ gene) + GOLDEN)
    return _mix(word + k1), _mix((k1 ^ word) + GOLDEN)


@compiled
def _fill_normal(
    seed: np.uint64, keys: NDArray[Any], samples: NDArray[Any], noise: NDArray[Any]
) -> None:
    """Box-Muller, two numbers from two uniform ones."""
    for row in range(noise.shape[0]):
        k0, k1 = stream_keys(NOISE, seed, keys[row], samples[row])
        for column in range(0, noise.shape[1], 2):
            number = np.uint64(column)
            radius = math.sqrt(-2.0 * math.log(uniform(k0, k1, number)))
            angle = 2.0 * math.pi * uniform(k0, k1, number + np.uint64(1))
            noise[row, column] = radius * math.cos(angle)
            if column + 1 < noise.shape[1]:
                noise[row, column + 1] = radius * math.sin(angle)


def cell_keys(names: Sequence[str]) -> NDArray[np.uint64]:
    """Hash cell names to the keys of their random numbers.

    Parameters
    ----------
    names : sequence of str
        Cell names; equal names get equal keys, on every machine and in every release.

    Returns
    -------
    ndarray[n_names], uint64
        First 8 bytes of BLAKE2b (digest size 8) of the UTF-8 name, little-endian.
    """
    digests = [blake2b(name.encode(), digest_size=8).digest() for name in names]
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)


def position_keys(start: int, stop: int) -> NDArray[np.uint64]:
    """Return keys for cells that have a position and no name.

    Parameters
    ----------
    start, stop : int
        First and one-past-last position.

    Returns
    -------
    ndarray[stop - start], uint64
        Distinct keys, spread over all 64 bits as hashed names are.
    """
    word = np.arange(start, stop, dtype=np.uint64) * GOLDEN + INIT_0
    word = (word ^ (word >> _S30)) * MIX_1
    word = (word ^ (word >> _S27)) * MIX_2
    return word ^ (word >> _S31)


def check_seed(seed: int) -> np.uint64:
    """Return the seed as the 64-bit word that streams are keyed by.

    Parameters
    ----------
    seed : int
        From 0 to 2**64 - 1.

    Returns
    -------
    uint64
        The same number.

    Raises
    ------
    ConfigError
        If the seed is outside that range.
    """
    if not 0 <= seed < 2**64:
        raise ConfigError(f"seed is {seed}", "give a seed from 0 to 2**64 - 1")
    return np.uint64(seed)


def check_streams(n_rows: int | None, seed: int, keys: ArrayLike, samples: ArrayLike) -> Streams:
    """Return the names of rows' streams as the words that kernels take.

    Parameters
    ----------
    n_rows : int or None
        How many rows there are; None takes the number of keys.
    seed : int
        From 0 to 2**64 - 1.
    keys, samples : array_like[n_rows], integer
        Cell key and sample number of every row.

    Returns
    -------
    Streams
        Its arrays are contiguous.

    Raises
    ------
    ConfigError
        If the seed is out of range, lengths differ or a value is negative or not an integer.
    """
    words = []
    for name, values in (("keys", keys), ("samples", samples)):
        array = np.asarray(values)
        if array.size == 0:
            array = array.astype(np.uint64)
        if array.dtype.kind not in "iu" or (array.dtype.kind == "i" and (array < 0).any()):
            raise ConfigError(
                f"{name} are of dtype {array.dtype}, or negative", "pass non-negative integers"
            )
        expected = len(array) if n_rows is None else n_rows
        n_rows = expected
        if array.shape != (expected,):
            raise ConfigError(
                f"{name} have shape {array.shape} for {expected} rows", "pass one value a row"
            )
        words.append(np.ascontiguousarray(array, dtype=np.uint64))
    return Streams(check_seed(seed), *words)


def normal_noise(seed: int, keys: ArrayLike, samples: ArrayLike, n: int) -> NDArray[np.float32]:
    """Draw standard normal noise, each row from its own stream.

    Parameters
    ----------
    seed : int
        From 0 to 2**64 - 1.
    keys, samples : array_like[n_rows], uint64
        Cell key and sample number of every row.
    n : int
        Numbers a row; a longer row begins with the same numbers as a shorter one.

    Returns
    -------
    ndarray[n_rows, n], float32
        Row i depends on (seed, keys[i], samples[i]) only, and is independent of what
        `draw_counts` draws for the same three.

    Raises
    ------
    ConfigError
        If seed, keys or samples are out of range, or their lengths differ.
    """
    streams = check_streams(None, seed, keys, samples)
    noise = np.empty((len(streams.keys), n), dtype=np.float32)
    # Below some thousand numbers a second thread costs more than it saves.
    pieces = spans(len(noise), min(4 * thread_count(), noise.size // 8192 + 1))
    run_all([partial(_fill_normal, *streams.of(slice(a, b)), noise[a:b]) for a, b in pieces])
    return noise

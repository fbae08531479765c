"""Exact random variates from counter-based streams.

Every function takes the stream's two key words and the number of its next random number, and
returns the variate and the number after those it used.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from rayvaec.kernels.rng import uniform

_ONE = np.uint64(1)
_TWO = np.uint64(2)


@njit(nogil=True)
def logarithmic(
    p: float, cluster: float, k0: np.uint64, k1: np.uint64, number: np.uint64
) -> tuple[int, np.uint64]:
    """Draw from P(k) = p**k / (k * cluster), cluster = -log(1-p) (Kemp 1981, algorithm LK)."""
    u = uniform(k0, k1, number)
    number += _ONE
    if u >= p:
        return 1, number
    q = -math.expm1(-cluster * uniform(k0, k1, number))
    number += _ONE
    if u <= q * q:
        return int(1.0 + math.log(u) / math.log(q)), number
    return (1 if u >= q else 2), number


@njit(nogil=True)
def gamma(shape: float, k0: np.uint64, k1: np.uint64, number: np.uint64) -> tuple[float, np.uint64]:
    """Draw from Gamma(shape, 1) (Marsaglia & Tsang 2000, with their boost below shape 1)."""
    boost = 1.0
    if shape < 1.0:
        boost = uniform(k0, k1, number) ** (1.0 / shape)
        number += _ONE
        shape += 1.0
    d = shape - 1.0 / 3.0
    c = 1.0 / math.sqrt(9.0 * d)
    while True:
        radius = math.sqrt(-2.0 * math.log(uniform(k0, k1, number)))
        z = radius * math.cos(2.0 * math.pi * uniform(k0, k1, number + _ONE))
        u = uniform(k0, k1, number + _TWO)
        number += _ONE + _TWO
        v = 1.0 + c * z
        if v <= 0.0:
            continue
        v = v * v * v
        if math.log(u) < 0.5 * z * z + d - d * v + d * math.log(v):
            return d * v * boost, number


@njit(nogil=True)
def poisson(mean: float, k0: np.uint64, k1: np.uint64, number: np.uint64) -> tuple[int, np.uint64]:
    """Draw from Poisson(mean): products of uniforms below 10, PTRS (Hormann 1993) above."""
    if mean < 10.0:
        k = 0
        floor = math.exp(-mean)
        product = uniform(k0, k1, number)
        number += _ONE
        while product > floor:
            k += 1
            product *= uniform(k0, k1, number)
            number += _ONE
        return k, number
    log_mean = math.log(mean)
    b = 0.931 + 2.53 * math.sqrt(mean)
    a = -0.059 + 0.02483 * b
    inverse_alpha = 1.1239 + 1.1328 / (b - 3.4)
    v_r = 0.9277 - 3.6224 / (b - 2.0)
    while True:
        u = uniform(k0, k1, number) - 0.5
        v = uniform(k0, k1, number + _ONE)
        number += _TWO
        us = 0.5 - abs(u)
        k = math.floor((2.0 * a / us + b) * u + mean + 0.43)
        if us >= 0.07 and v <= v_r:
            return k, number
        if k < 0 or (us < 0.013 and v > us):
            continue
        left = math.log(v * inverse_alpha / (a / (us * us) + b))
        if left <= k * log_mean - mean - math.lgamma(k + 1.0):
            return k, number


@njit(nogil=True)
def large_negative_binomial(
    size: float, odds: float, k0: np.uint64, k1: np.uint64, number: np.uint64
) -> tuple[int, np.uint64]:
    """Draw NB(size, odds) as Poisson of a gamma mean, in constant time however large."""
    mean, number = gamma(size, k0, k1, number)
    return poisson(mean * odds, k0, k1, number)

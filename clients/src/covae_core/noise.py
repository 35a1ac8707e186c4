"""Noise as a pure function of a seed, made of nothing but int64 multiplications, additions and remainders.

The same numbers come out of NumPy here, of torch (`covae_train.torch_backend`) and of every exported ONNX graph:
ONNX's own random operators are stateful, and its CUDA provider has neither bit operations nor integer division for
int64.

A seed and a stream are hashed to the two states of L'Ecuyer's combined multiplicative generator (Communications of the
ACM 31, 1988; period 2^61), whose k-th value needs only the precomputed multipliers aᵏ mod p; Box–Muller makes normals.
"""

from __future__ import annotations

from enum import IntEnum
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Of the numbers that a seed gives: a model tells its clients, as images change with it. 1 let seeds collide.
NOISE_VERSION = 2
# L'Ecuyer 1988, table of portable combined generators: two moduli (both prime) and their multipliers.
MODULI = (2147483563, 2147483399)
MULTIPLIERS = (40014, 40692)
# A third prime: with the two above, the remainders of any 64-bit seed determine it.
SEED_PRIME = 2147483647
# Constants of the hash's rounds: the first digits of √2, √3, √5, √7, √11, √13, √17 and √19.
ROUND_CONSTANTS = (414213562, 732050807, 236067977, 645751311, 316624790, 605551275, 123105625, 358898943)


class Stream(IntEnum):
    """What a seed's numbers are used for; two streams of one seed are independent."""

    LATENT = 1
    FACTOR = 2
    PIXEL = 3
    POSTERIOR = 4
    OBSERVATION = 5
    POSE = 6
    POSE_POSTERIOR = 7
    CHROMA = 8
    CHROMA_OBSERVATION = 9


@cache
def jump_multipliers(count: int) -> NDArray[np.int64]:
    """Multipliers aᵏ mod p for k = 1 … count. shape: (2, count)"""
    powers = np.ones((2, count), dtype=np.int64)
    for row, (modulus, multiplier) in enumerate(zip(MODULI, MULTIPLIERS, strict=True)):
        filled = 1
        powers[row, 0] = multiplier
        while filled < count:
            step = min(filled, count - filled)
            powers[row, filled : filled + step] = powers[row, :step] * powers[row, filled - 1] % modulus
            filled += step
    powers.setflags(write=False)
    return powers


def stream_states(seeds: Any, stream: Stream) -> tuple[Any, Any]:
    """Hash (seed, stream) to the generator's two states: eight Feistel rounds of squarings modulo the two primes.

    Two remainders of the seed are the states' beginnings, and the third is the key of every round, so seeds that agree
    in the first two go through different rounds.

    seeds: an int64 array of NumPy or tensor of torch, of any shape; the states are of the same kind and shape.
    """
    p, q = MODULI
    x = (seeds % p + int(stream) * 1000003) % p
    y = seeds % q
    key = seeds % SEED_PRIME + 1
    for constant in ROUND_CONSTANTS:
        mixed = (y + key * constant) % p
        x = (x + mixed * mixed % p * MULTIPLIERS[0]) % p
        mixed = (x + key * constant) % q
        y = (y + mixed * mixed % q * MULTIPLIERS[1]) % q
    return 1 + x % (p - 1), 1 + y % (q - 1)


def uniform(seeds: NDArray[np.int64], count: int, stream: Stream) -> NDArray[np.float64]:
    """Numbers strictly between 0 and 1. seeds: (N,) int64; returns (N, count)."""
    x, y = stream_states(np.asarray(seeds, dtype=np.int64), stream)
    first, second = jump_multipliers(count)
    period = MODULI[0] - 1
    value: NDArray[np.int64] = (x[:, None] * first % MODULI[0] - y[:, None] * second % MODULI[1]) % period
    return (value + 0.5) / period


def standard_normal(
    seeds: NDArray[np.int64], count: int, stream: Stream, dtype: Any = np.float32
) -> NDArray[np.floating[Any]]:
    """Standard normals, row n a pure function of seeds[n] and stream. seeds: (N,) int64; returns (N, count)."""
    half = (count + 1) // 2
    numbers = uniform(seeds, 2 * half, stream)
    radius = np.sqrt(-2 * np.log(numbers[:, :half]))
    angle = 2 * np.pi * numbers[:, half:]
    normals: NDArray[np.float64] = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return normals[:, :count].astype(dtype)


MAX_SEED = 2**31 - 1


def row_seeds(seed: int, indices: NDArray[np.int64]) -> NDArray[np.int64]:
    """The wire's seed of image `index` under a user's `seed`: seed · 2³² + index, so any prefix of a batch repeats."""
    return np.int64(seed) * np.int64(2**32) + np.asarray(indices, dtype=np.int64)

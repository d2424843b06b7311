"""Random numbers that are a pure function of a key: nothing to save or restore."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np

__all__ = ["Stream", "permutation", "uniform"]

GOLDEN = 0x9E3779B97F4A7C15  # SplitMix64's step and its two factors
MIX = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


class Stream(IntEnum):
    """First part of every key: no two uses draw the same numbers."""

    CROP = 1
    COLOUR = 2
    ORDER = 3
    MOMENTS_SAMPLE = 4
    IBOT_BLOCKS = 11
    IBOT_SHARE = 12
    BEIT_BLOCKS = 13
    CODEBOOK_SAMPLE = 14
    CODEBOOK_CENTRES = 15
    NOISE = 16
    NOISE_LEVEL = 17


def mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser, a bijection of uint64 that spreads each bit over all."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(MIX[0])
    x = (x ^ (x >> np.uint64(27))) * np.uint64(MIX[1])
    return x ^ (x >> np.uint64(31))


def hash_key(key: Sequence[int]) -> np.ndarray:
    """Integers of any size → uint64 [1]; order matters."""
    state = np.zeros(1, dtype=np.uint64)
    for part in key:
        state = mix(state + np.uint64(GOLDEN) + mix(np.array([part & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64)))
    return state


def uniform(key: Sequence[int], indices: np.ndarray, count: int) -> np.ndarray:
    """Uniform numbers in [0, 1): a SplitMix64 stream for each (key, index) (Steele, Lea and Flood 2014).

    Args:
        key: integers, such as (Stream.CROP, seed, epoch, slot).
        indices: int64 [B].
        count: numbers for each index.

    Returns:
        float64 [B, count]; a row depends on its own index alone, a number not on `count`.
    """
    start = mix(hash_key(key) + np.uint64(GOLDEN) * indices.astype(np.uint64))
    steps = np.uint64(GOLDEN) * np.arange(1, count + 1, dtype=np.uint64)
    return (mix(start[:, None] + steps) >> np.uint64(11)) * 2.0**-53


def permutation(key: Sequence[int], size: int) -> np.ndarray:
    """A permutation of 0..size−1, int64 [size]."""
    return np.argsort(uniform(key, np.arange(size), 1)[:, 0], kind="stable")

"""Gaussian noise that is a function of an image's number in the batch of all ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hsv.data.hashing import GOLDEN, MIX, Stream, hash_key, uniform

__all__ = ["gaussian_noise"]


def gaussian_noise(
    images: Tensor, sigma: float, drawn: bool, key: Sequence[int], first_index: int
) -> tuple[Tensor, Tensor]:
    """Noise [B, C, H, W] for images of that shape and its standard deviations [B], float32.

    Args:
        images: only shape and device are read.
        sigma: standard deviation, or the largest if `drawn`: each image's is then uniform in [0, sigma].
        key: integers such as (seed, draw). With an image's number they determine its noise.
        first_index: number of the first image in the batch of all ranks.
    """
    numbers = np.arange(first_index, first_index + len(images))
    share = uniform((Stream.NOISE_LEVEL, *key), numbers, 1)[:, 0] if drawn else np.ones(len(images))
    level = torch.from_numpy(sigma * share).float().to(images.device)
    streams = torch.from_numpy((hash_key((Stream.NOISE, *key)) * 2 + numbers.astype(np.uint64)).view(np.int64))
    noise = normal(mix(streams.to(images.device)), images[0].numel() if len(images) else 0).reshape(images.shape)
    return noise * level[:, None, None, None], level


def normal(streams: Tensor, count: int) -> Tensor:
    """Standard normal numbers [B, count] of each stream int64 [B]: Box and Muller's pairs of SplitMix64's halves."""
    half = (count + 1) // 2
    steps = torch.arange(1, half + 1, device=streams.device) * wrapped(GOLDEN)
    bits = mix(streams[:, None] + steps)
    first, second = (bits >> 32 & 0xFFFFFF), (bits & 0xFFFFFF)  # 24 bits each, as many as a float32 holds
    radius = (-2 * ((first + 1).float() * 2**-24).log()).sqrt()
    angle = second.float() * (2 * math.pi * 2**-24)
    return torch.cat([radius * angle.cos(), radius * angle.sin()], 1)[:, :count]


def mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64, whose products wrap as those of uint64."""
    x = (x ^ shifted(x, 30)) * wrapped(MIX[0])
    x = (x ^ shifted(x, 27)) * wrapped(MIX[1])
    return x ^ shifted(x, 31)


def shifted(x: Tensor, by: int) -> Tensor:
    """A logical shift to the right."""
    return x >> by & (1 << 64 - by) - 1


def wrapped(value: int) -> int:
    """The int64 of the same bits as a uint64."""
    return value - (1 << 64) if value >> 63 else value

"""A sample of the training images, and their mean and deviation, for normalisation."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from hsv.data.cache import read_image
from hsv.data.decode import UndecodableImage
from hsv.data.hashing import Stream, permutation
from hsv.data.loader import as_size
from hsv.data.sources import Source
from hsv.data.views import centre_view

__all__ = ["sample_images", "statistics"]


def sample_images(
    source: Source,
    channels: int,
    image_size: int | tuple[int, int],
    limit: int = 2000,
    seed: int = 0,
) -> Iterator[np.ndarray]:
    """Centre views, uint8 [H, W, C], of at most `limit` images, in the order of the source.

    Images that cannot be decoded are passed over.

    Raises:
        ValueError: none of the chosen images can be decoded.
    """
    chosen = np.sort(permutation((Stream.MOMENTS_SAMPLE, seed), len(source))[:limit])
    size = as_size(image_size)
    error, found = None, False
    for index in chosen.tolist():
        try:
            view = centre_view(read_image(source, index, channels, min_side=2 * max(size)), size)
        except UndecodableImage as e:
            error = e
            continue
        found = True
        yield view
    if not found:
        raise ValueError(f"source: none of {len(chosen)} images can be decoded, the last one being {error}")


def statistics(
    source: Source,
    channels: int,
    image_size: int | tuple[int, int],
    limit: int = 2000,
    seed: int = 0,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over at most `limit` images, in units of [0, 1].

    Images that cannot be decoded are passed over. A deviation is at least 1/255: it will divide.

    Raises:
        ValueError: none of the chosen images can be decoded.
    """
    counts = np.zeros((channels, 256), dtype=np.int64)
    for view in sample_images(source, channels, image_size, limit, seed):
        counts += np.stack([np.bincount(view[..., c].reshape(-1), minlength=256) for c in range(channels)])
    values = np.arange(256) / 255.0
    weights = counts / counts.sum(1, keepdims=True)
    mean = weights @ values
    std = np.sqrt((weights * (values - mean[:, None]) ** 2).sum(1))
    return tuple(mean.tolist()), tuple(np.maximum(std, 1 / 255).tolist())

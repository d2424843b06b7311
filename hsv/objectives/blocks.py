"""Masks made of rectangles (BEiT, Bao et al. 2021, algorithm 1), which iBOT and BEiT share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hsv.data.hashing import uniform

__all__ = ["block_masks"]

BLOCKS = 16  # enough to cover any share that the methods use; patches that no block reaches are masked last
SMALLEST = 12  # a block has at least 1 / SMALLEST of the patches: 16 of 196, as published
LONGEST = 10 / 3  # ratio of height to width, or its inverse


def block_masks(key: Sequence[int], indices: np.ndarray, grid: tuple[int, int], counts: np.ndarray) -> np.ndarray:
    """Masks of exactly `counts` patches, in rectangles of random area, shape and place.

    Blocks are laid until there are enough patches, and the last is cut off row by row, from above or from below. An
    image's blocks are a function of the key and its index alone.

    Args:
        key: integers such as (seed, draw, slot).
        indices: int64 [B], numbers of the images in the batch of all ranks.
        grid: rows and columns of patches, L in all.
        counts: int64 [B], patches to mask, 0 to L.

    Returns:
        bool [B, L].
    """
    rows, columns = grid
    size = rows * columns
    numbers = uniform(key, indices, 4 * BLOCKS + 1)
    upwards, numbers = numbers[:, -1:] < 0.5, numbers[:, :-1].reshape(-1, 4, BLOCKS)  # area, ratio, top, left
    least = max(1, size // SMALLEST)
    area = least + (np.maximum(counts[:, None], least) - least) * numbers[:, 0]  # [B, BLOCKS]
    ratio = LONGEST ** (2 * numbers[:, 1] - 1)
    height = np.clip(np.rint(np.sqrt(area * ratio)), 1, rows)
    width = np.clip(np.rint(np.sqrt(area / ratio)), 1, columns)
    top = np.floor(numbers[:, 2] * (rows - height + 1))
    left = np.floor(numbers[:, 3] * (columns - width + 1))

    row, column = np.divmod(np.arange(size), columns)  # [L]
    row, column = row[:, None, None], column[:, None, None]
    covered = (row >= top) & (row < top + height) & (column >= left) & (column < left + width)  # [L, B, BLOCKS]
    first = np.where(covered.any(2), covered.argmax(2), BLOCKS).T  # [B, L], the block that reaches a patch first
    place = np.where(upwards, np.arange(size)[::-1], np.arange(size))
    order = (first * size + place).argsort(1)
    masks = np.empty(first.shape, dtype=bool)
    np.put_along_axis(masks, order, np.arange(size) < counts[:, None], 1)
    return masks

"""Positions of patches for another grid than they were learned on."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["resample_positions"]


def resample_positions(positions: Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Positions [1, L, D] of `grid` = (rows, columns) to those of `new_grid`, bicubic and antialiased as timm does."""
    if grid == new_grid:
        return positions
    pixels = positions.unflatten(1, grid).permute(0, 3, 1, 2)  # [1, D, rows, columns]
    return F.interpolate(pixels.float(), new_grid, mode="bicubic", antialias=True).flatten(2).mT.to(positions.dtype)

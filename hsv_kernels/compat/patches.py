"""Patches back into an image."""

from torch import Tensor

__all__ = ["folded"]


def folded(patches: Tensor, p: int, rows: int, columns: int, channels: int) -> Tensor:
    """[B, rows · columns, p·p·C] → [B, C, rows · p, columns · p]: the inverse of patchify, of any dtype."""
    grid = patches.reshape(len(patches), rows, columns, p, p, channels)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), channels, rows * p, columns * p)

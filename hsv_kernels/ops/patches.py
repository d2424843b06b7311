"""Where patches and tokens lie in memory, in the words that every backend's kernels share (csrc/cpu/masking.h)."""

from torch import Tensor

__all__ = ["Strides", "packed_strides", "patch_strides"]

#: Of a sample; width of the grid; of a row and a column of the grid; of a row, a column and a channel within a patch.
Strides = tuple[int, int, int, int, int, int, int]


def patch_strides(images: Tensor, p: int, q: int) -> Strides:
    """Where the patches of [B, C, H, W] lie."""
    batch, channel, row, column = images.stride()
    return batch, images.shape[3] // q, p * row, q * column, row, column, channel


def packed_strides(rows: Tensor, q: int, C: int) -> Strides:
    """Where the patches of [B, L, p·q·C] lie; a token is a patch of one pixel, C = D."""
    batch, row, value = rows.stride()
    return batch, 1, row, 0, q * C * value, C * value, value

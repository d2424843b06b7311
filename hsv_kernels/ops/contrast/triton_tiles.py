"""Tiles of the Triton contrast kernels: their sizes for each architecture, and what every kernel does with one."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from hsv_kernels.ops.triton_utils import Architecture, architecture_of, dot

__all__ = [
    "LN2",
    "LOG2E",
    "Tiles",
    "architecture_of",
    "backward_tiles",
    "forward_tiles",
    "load_rows",
    "log1p_exp",
    "padded",
    "rows_of_tile",
    "similarity",
]

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


class Tiles(NamedTuple):
    """Rows, columns and dimensions of a tile, and how it is compiled."""

    rows: int
    columns: int
    dims: int
    num_warps: int
    num_stages: int

    def width(self, dim: int) -> int:
        """D padded to whole chunks: the row length of z in memory."""
        return triton.cdiv(dim, self.dims) * self.dims

    def options(self, dim: int) -> dict[str, int]:
        """What the tile fixes at compile time for D = dim."""
        return {
            "WIDTH": self.width(dim),
            "BLOCK_M": self.rows,
            "BLOCK_N": self.columns,
            "BLOCK_D": self.dims,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


def forward_tiles(architecture: Architecture, dtype: torch.dtype, dim: int) -> Tiles:
    """The tile of logsumexp_kernel; an architecture that is not listed takes the smallest."""
    dims = max(16, triton.next_power_of_2(dim))
    if dtype == torch.float32:
        return Tiles(64, 64, min(dims, 32), 4, 2)
    if architecture in (80, 90, 100):
        return Tiles(128, 128, dims if dims <= 128 else 64, 8, 2)
    return Tiles(64, 64, min(dims, 64), 4, 2)


def backward_tiles(architecture: Architecture, dtype: torch.dtype, dim: int) -> Tiles:
    """The tile of gradient_kernel; an architecture that is not listed takes the smallest."""
    dims = max(16, triton.next_power_of_2(dim))
    if dtype == torch.float32:
        return Tiles(64, 32, min(dims, 64 if architecture in (90, 100) else 32), 4, 2)
    if architecture in (80, 90, 100):
        return Tiles(128, 64, min(dims, 128), 8, 2)
    return Tiles(64, 32, min(dims, 64), 4, 2)


@triton.jit
def log1p_exp(x):
    """log(1 + exp(x)) with every digit of its small values."""
    b_u = tl.exp(-tl.abs(x))
    b_w = 1 + b_u
    b_log1p = tl.where(b_w == 1, b_u, tl.log(b_w) * (b_u / (b_w - 1)))
    return tl.maximum(x, 0) + b_log1p


@triton.jit
def rows_of_tile(i_n, M, BLOCK_N: tl.constexpr):
    """Rows of the tile that begins at row i_n, counted from there; past the end the last row again."""
    return tl.minimum(tl.arange(0, BLOCK_N), M - 1 - i_n).to(tl.int32)


@triton.jit
def load_rows(p_z, i_n, o_n, o_d, WIDTH: tl.constexpr):
    """Rows i_n + o_n of the contiguous z [M, WIDTH] at dimensions o_d."""
    return tl.load(p_z + tl.cast(i_n, tl.int64) * WIDTH + (o_n[:, None] * WIDTH + o_d[None, :]))


@triton.jit
def similarity(
    p_z, i_m, o_m, i_n, o_n,
    PRECISION: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """z_m · z_n as float32 [BLOCK_M, BLOCK_N], D in chunks."""
    b_s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i_d in range(0, WIDTH, BLOCK_D):
        o_d = i_d + tl.arange(0, BLOCK_D)
        b_m = load_rows(p_z, i_m, o_m, o_d, WIDTH)
        b_n = load_rows(p_z, i_n, o_n, o_d, WIDTH)
        b_s = dot(b_m, tl.trans(b_n), b_s, PRECISION)
    return b_s


def padded(q: Tensor, width: int) -> Tensor:
    """q [n, D] contiguous, with zeros from D to width."""
    return q.contiguous() if q.shape[1] == width else F.pad(q, (0, width - q.shape[1]))

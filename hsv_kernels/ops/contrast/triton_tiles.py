"""What every Triton contrast kernel does with a tile."""

import functools
from enum import IntEnum

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from hsv_kernels.ops.triton_utils import LN2, LOG2E, dot

__all__ = [
    "LN2",
    "LOG2E",
    "Shift",
    "candidates",
    "fewest_splits",
    "fits_fixed_shift",
    "gradient_unit",
    "load_rows",
    "log1p_exp",
    "padded",
    "place_of_row",
    "rows_of_tile",
    "similarity",
    "tiles_of_rows",
]


class Shift(IntEnum):
    """What is taken off logits before they are exponentiated: nothing, the maximum, or as the device decides."""

    FIXED = 0
    ONLINE = 1
    DEVICE = 2


@triton.jit
def log1p_exp(x):
    """log(1 + exp(x)) with every digit of its small values."""
    b_u = tl.exp(-tl.abs(x))
    b_w = 1 + b_u
    b_log1p = tl.where(b_w == 1, b_u, tl.log(b_w) * (b_u / (b_w - 1)))
    return tl.maximum(x, 0) + b_log1p


@triton.jit
def fits_fixed_shift(b_scale, M):
    """True while exponentials of similarities of normalised rows may be summed as they are: scale + ln M < 64."""
    return b_scale + tl.log(tl.cast(M, tl.float32)) < 64


@triton.jit
def place_of_row(o_m, M, PAIRS: tl.constexpr):
    """Where values of row m of z lie among those of the caller: with PAIRS z alternates between two views."""
    return o_m % 2 * (M // 2) + o_m // 2 if PAIRS else o_m


@triton.jit
def candidates(
    i_m, i_n, M, PAIRS: tl.constexpr, EXCLUDE_SELF: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Which columns each row sums over: those there are, less itself and, with PAIRS, less its other view."""
    o_m = i_m.to(tl.int32) + tl.arange(0, BLOCK_M)
    o_n = i_n.to(tl.int32) + tl.arange(0, BLOCK_N)
    m_n = (o_n < M)[None, :]
    if PAIRS:
        m_n &= (o_m // 2)[:, None] != (o_n // 2)[None, :]
    elif EXCLUDE_SELF:
        m_n &= o_m[:, None] != o_n[None, :]
    return m_n


@triton.jit
def rows_of_tile(i_n, M, BLOCK_N: tl.constexpr):
    """Rows of the tile that begins at row i_n, counted from there; past the end the last row again."""
    return tl.minimum(tl.arange(0, BLOCK_N), M - 1 - i_n).to(tl.int32)


@triton.jit
def tiles_of_rows(i_m, begin, end, M, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """How rows i_m … go through the columns begin … end, in tiles that need a mask and in whole ones that need none.

    Returns where the columns begin that are the rows themselves, in how many tiles they lie here, the tiles that need
    a mask (these and, where BLOCK_N does not divide M, the last one at `whole`), how many columns the walk over the
    others skips where it meets the rows themselves, and `whole`.
    """
    BLOCK_O: tl.constexpr = max(BLOCK_M, BLOCK_N)
    whole = tl.cast(M, tl.int64) // BLOCK_N * BLOCK_N
    i_own = i_m // BLOCK_O * BLOCK_O
    own_end = tl.where((begin <= i_own) & (i_own < end), tl.minimum(i_own + BLOCK_O, end), i_own)
    own = tl.cdiv(own_end - i_own, BLOCK_N)
    masked = own + tl.where((end > whole) & (own_end <= whole), 1, 0)
    skipped = tl.maximum(tl.minimum(own_end, whole) - i_own, 0)
    return i_own, own, masked, skipped, whole


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


@functools.cache
def fewest_splits(programs: int, most: int, slots: int) -> int:
    """Parts to split each of `programs` into, at most `most`: as few as fill a device about as well as any number does.

    `slots` is how many the device runs at once. A twentieth of it is given away for fewer parts.
    """

    def filled(splits: int) -> float:
        """The part of the device that is at work until the last program ends."""
        return programs * splits / (slots * triton.cdiv(programs * splits, slots))

    fullest = max(map(filled, range(1, most + 1)))
    return next(splits for splits in range(1, most + 1) if filled(splits) >= 0.95 * fullest)


def gradient_unit(dtype: torch.dtype, most: float, *gradients: Tensor) -> Tensor:
    """What incoming gradients are divided by (0-dim float32): 1, or for float16 what makes the largest `most`.

    `most` leaves room below float16's 65,504 for what weights add to it; a weight of 2^-27 is still a normal number.
    """
    if dtype != torch.float16:
        return gradients[0].new_ones(())
    largest = functools.reduce(torch.maximum, (grad.abs().amax() for grad in gradients))
    return largest.clamp_min(2.0**-100) / most  # above 0, whatever the gradients

"""Gradients of logsumexps over the square of similarities z zᵀ in Triton: Σ_j W_ij z_j, W recomputed tile by tile."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hsv_kernels.ops.contrast import triton_square_matmul
from hsv_kernels.ops.contrast.triton_table import Kernel, Tiles, chosen_tiles
from hsv_kernels.ops.contrast.triton_tiles import (
    LOG2E,
    Shift,
    candidates,
    fewest_splits,
    fits_fixed_shift,
    gradient_unit,
    load_rows,
    place_of_row,
    rows_of_tile,
    similarity,
    tiles_of_rows,
)
from hsv_kernels.ops.triton_utils import dot, dot_precision, processors_of, round_to

__all__ = ["gradient_kernel", "weight_kernel", "weighted_rows"]


@triton.jit
def weight_kernel(p_grad, p_unit, p_kept, p_weight, M, stride_grad, PAIRS: tl.constexpr, BLOCK_M: tl.constexpr):
    """weight_i = factor_i grad_i / unit, in the order of z."""
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < M
    b_weight = tl.load(p_grad + place_of_row(o_m, M, PAIRS) * stride_grad, mask=m_m, other=0) / tl.load(p_unit)
    tl.store(p_weight + o_m, b_weight * tl.load(p_kept + o_m, mask=m_m, other=0), mask=m_m)


@triton.jit
def add_weighted_tile(
    p_z, p_weight, p_kept, b_m, b_weight_m, b_shift_m, b_scale, b_gradient, i_m, i_n, i_d, M,
    MASKED: tl.constexpr, PAIRS: tl.constexpr, EXCLUDE_SELF: tl.constexpr, ONLINE: tl.constexpr,
    PRECISION: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """b_gradient + Σ_j W_ij z_j over the columns i_n … of one tile."""
    o_n = rows_of_tile(i_n, M, BLOCK_N) if MASKED else tl.arange(0, BLOCK_N)
    b_weight_n = tl.load(p_weight + i_n + o_n)
    b_n = load_rows(p_z, i_n, o_n, i_d + tl.arange(0, BLOCK_D), WIDTH)
    if WIDTH == BLOCK_D:
        b_s = dot(b_m, tl.trans(b_n), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
    else:
        o_m = rows_of_tile(i_m, M, BLOCK_M)
        b_s = similarity(p_z, i_m, o_m, i_n, o_n, PRECISION, WIDTH, BLOCK_M, BLOCK_N, BLOCK_D)
    b_s *= b_scale
    if ONLINE:
        b_shift_n = tl.load(p_kept + M + i_n + o_n)
        b_w = b_weight_m[:, None] * tl.exp2(b_s - b_shift_m[:, None])
        b_w += b_weight_n[None, :] * tl.exp2(b_s - b_shift_n[None, :])
    else:
        b_w = tl.exp2(b_s) * (b_weight_m[:, None] + b_weight_n[None, :])
    if MASKED:
        b_w = tl.where(candidates(i_m, i_n, M, PAIRS, EXCLUDE_SELF, BLOCK_M, BLOCK_N), b_w, 0)
    return dot(round_to(b_w, p_z.dtype.element_ty), b_n, b_gradient, PRECISION)


@triton.jit
def gradient_kernel(
    p_z, p_scale, p_kept, p_weight, p_rows, M, D, COLUMNS,
    PAIRS: tl.constexpr, EXCLUDE_SELF: tl.constexpr, ONLINE: tl.constexpr, GUARDED: tl.constexpr,
    PRECISION: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Σ_j W_ij z_j over one split of COLUMNS columns and one chunk of D, at rows [split, M, D].

    W_ij = weight_i 2^(s_ij − shift_i) + weight_j 2^(s_ij − shift_j); with a fixed shift 2^s_ij (weight_i + weight_j).
    """
    i_m = tl.program_id(0).to(tl.int64) * BLOCK_M
    i_d = tl.program_id(1) * BLOCK_D
    i_split = tl.program_id(2).to(tl.int64)
    b_scale = tl.load(p_scale)
    if GUARDED:
        if fits_fixed_shift(b_scale, M) == ONLINE:
            return
    b_scale *= LOG2E
    begin, end = i_split * COLUMNS, tl.minimum((i_split + 1) * COLUMNS, M)
    i_own, own, masked, skipped, whole = tiles_of_rows(i_m, begin, end, M, BLOCK_M, BLOCK_N)

    o_m = rows_of_tile(i_m, M, BLOCK_M)
    b_weight_m = tl.load(p_weight + i_m + o_m)
    b_shift_m = tl.load(p_kept + M + i_m + o_m)
    b_m = load_rows(p_z, i_m, o_m, i_d + tl.arange(0, BLOCK_D), WIDTH)
    b_gradient = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for i_k in tl.range(masked, num_stages=1):
        i_n = tl.where(i_k < own, i_own + i_k * BLOCK_N, whole)
        b_gradient = add_weighted_tile(
            p_z, p_weight, p_kept, b_m, b_weight_m, b_shift_m, b_scale, b_gradient, i_m, i_n, i_d, M,
            True, PAIRS, EXCLUDE_SELF, ONLINE, PRECISION, WIDTH, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    for i_k in range(begin, tl.minimum(end, whole) - skipped, BLOCK_N):
        i_n = i_k + tl.where(i_k >= i_own, skipped, 0)
        b_gradient = add_weighted_tile(
            p_z, p_weight, p_kept, b_m, b_weight_m, b_shift_m, b_scale, b_gradient, i_m, i_n, i_d, M,
            False, PAIRS, EXCLUDE_SELF, ONLINE, PRECISION, WIDTH, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip

    o_m = i_m + tl.arange(0, BLOCK_M)
    o_d = i_d + tl.arange(0, BLOCK_D)
    m_md = (o_m < M)[:, None] & (o_d < D)[None, :]
    tl.store(p_rows + (i_split * M + o_m)[:, None] * D + o_d[None, :], b_gradient, mask=m_md)


def weighted_rows(
    grad: Tensor, z: Tensor, dim: int, scale: Tensor, kept: Tensor, pairs: bool, exclude_self: bool, shift: Shift
) -> tuple[Tensor, Tensor]:
    """Σ_j W_ij z_j in parts [splits, M, dim] to be added, float32, in units of a 0-dim tensor.

    The unit keeps W in the range of the dtype of z. `kept` [2, M] is the forward's; `grad` [M] is the caller's, and
    in the order of the caller; z is [M, row_width], zero from column dim on.
    """
    m = z.shape[0]
    unit = gradient_unit(z.dtype, 2.0**13, grad)  # W reaches twice that, and float16 ends at 65,504
    weight = torch.empty_like(kept[0])
    with torch.cuda.device_of(z):
        weight_kernel[(triton.cdiv(m, 128),)](*(grad, unit, kept, weight, m, grad.stride(0)), PAIRS=pairs, BLOCK_M=128)
    weigh = rows_by_tiles if dim <= triton_square_matmul.LARGEST_TILED_DIM else triton_square_matmul.rows_by_matmul
    return weigh(z, dim, scale, kept, weight, pairs, exclude_self, shift), unit


def rows_by_tiles(
    z: Tensor, dim: int, scale: Tensor, kept: Tensor, weight: Tensor, pairs: bool, exclude_self: bool, shift: Shift
) -> Tensor:
    """Σ_j W_ij z_j in parts [splits, M, dim], float32, from the weights [M] of `weight_kernel`."""

    def run(shift: Shift, tiles: dict[bool, Tiles]) -> Tensor:
        return _rows_by_tiles(z, dim, scale, kept, weight, pairs, exclude_self, shift, tiles)

    def tiles_for(online: bool) -> Tiles:
        kernel, alone = (Kernel.ONLINE, Shift.ONLINE) if online else (Kernel.FIXED, Shift.FIXED)
        return chosen_tiles(kernel, gradient_kernel, z, dim, lambda tiles: run(alone, {online: tiles}), online, pairs)

    variants = [online for online in (False, True) if shift in (int(online), Shift.DEVICE)]
    return run(shift, {online: tiles_for(online) for online in variants})


def _rows_by_tiles(
    z: Tensor,
    dim: int,
    scale: Tensor,
    kept: Tensor,
    weight: Tensor,
    pairs: bool,
    exclude_self: bool,
    shift: Shift,
    tiles: dict[bool, Tiles],
) -> Tensor:
    """`rows_by_tiles` with the tiles of each variant of gradient_kernel that is launched, online or not."""
    m = z.shape[0]
    columns, splits = columns_of_splits(z, dim, next(iter(tiles.values())))
    rows = scale.new_empty(splits, m, dim)
    with torch.cuda.device_of(z):
        for online, tile in tiles.items():
            gradient_kernel[(triton.cdiv(m, tile.rows), triton.cdiv(dim, tile.dims), splits)](
                *(z, scale, kept, weight, rows, m, dim, columns),
                PAIRS=pairs,
                EXCLUDE_SELF=exclude_self,
                ONLINE=online,
                GUARDED=shift == Shift.DEVICE,
                PRECISION=dot_precision(z),
                **tile.options(z.shape[1]),
            )
    return rows


#: Columns that splits begin at: a multiple of the rows and columns of every tile.
SPLIT_BLOCK = 128


def columns_of_splits(z: Tensor, dim: int, tiles: Tiles) -> tuple[int, int]:
    """Columns of a split, and splits: as few as fill the device about as well as any number does.

    A twentieth is given away for fewer; their rows take 2·M·D floats or 8 MiB at most.
    """
    m = z.shape[0]
    blocks, slots = triton.cdiv(m, SPLIT_BLOCK), tiles.programs * processors_of(z)
    programs = triton.cdiv(m, tiles.rows) * triton.cdiv(dim, tiles.dims)
    most = min(blocks, max(2, (8 << 20) // (4 * m * dim)))
    splits = fewest_splits(programs, most, slots)
    columns = triton.cdiv(blocks, splits)
    return columns * SPLIT_BLOCK, triton.cdiv(blocks, columns)

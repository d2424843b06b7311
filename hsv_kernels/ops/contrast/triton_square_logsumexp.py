"""Sums of exponentials over the square of similarities z zᵀ in Triton, and their logarithms.

Rows are those of `normalise`: with PAIRS the two views of an image are neighbours, so that what a row leaves out lies
on the diagonal tiles. Every partial sum has one writer and a slot of its own, and slots are added in their order.
"""

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hsv_kernels.ops.contrast.triton_table import Kernel, Tiles, chosen_tiles
from hsv_kernels.ops.contrast.triton_tiles import (
    LN2,
    LOG2E,
    Shift,
    candidates,
    fits_fixed_shift,
    load_rows,
    log1p_exp,
    place_of_row,
    rows_of_tile,
    similarity,
    tiles_of_rows,
)
from hsv_kernels.ops.triton_utils import dot, dot_precision, processors_of

__all__ = ["Sums", "logsumexp", "logsumexp_kernel", "merge_kernel", "online_kernel"]


@triton.jit
def group_pair(i, GROUPS):
    """The groups (i_g, i_h), i_g ≥ i_h, of program i: pairs of two groups first, then each with itself, the shorter."""
    pairs = GROUPS * (GROUPS - 1) // 2
    i_a = i % GROUPS
    i_b = (i_a + i // GROUPS + 1) % GROUPS
    i_g = tl.where(i < pairs, tl.maximum(i_a, i_b), i - pairs)
    i_h = tl.where(i < pairs, tl.minimum(i_a, i_b), i - pairs)
    return i_g, i_h


@triton.jit
def add_tile(
    p_z, i_m, i_n, M, b_scale, b_top, b_sum,
    MASKED: tl.constexpr, PAIRS: tl.constexpr, EXCLUDE_SELF: tl.constexpr, ONLINE: tl.constexpr,
    PRECISION: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Adds the columns i_n … of a tile to Σ_j 2^(s_ij − top_i) of its rows i_m …"""
    o_m = rows_of_tile(i_m, M, BLOCK_M)
    o_n = rows_of_tile(i_n, M, BLOCK_N) if MASKED else tl.arange(0, BLOCK_N)
    b_s = b_scale * similarity(p_z, i_m, o_m, i_n, o_n, PRECISION, WIDTH, BLOCK_M, BLOCK_N, BLOCK_D)
    if MASKED:
        b_s = tl.where(candidates(i_m, i_n, M, PAIRS, EXCLUDE_SELF, BLOCK_M, BLOCK_N), b_s, -float("inf"))
    if ONLINE:
        b_higher = tl.maximum(b_top, tl.max(b_s, 1))
        b_shift = tl.where(b_higher == -float("inf"), 0, b_higher)
        b_sum = b_sum * tl.exp2(b_top - b_shift) + tl.sum(tl.exp2(b_s - b_shift[:, None]), 1)
        b_top = b_higher
    else:
        b_sum += tl.sum(tl.exp2(b_s), 1)
    return b_top, b_sum


@triton.jit
def pairs_of_groups(
    p_z, p_sum, i_pair, b_scale, M, whole, GROUP, GROUPS,
    PRECISION: tl.constexpr, FOLDED: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Tiles below the diagonal ones, of rows of group i_g and columns of group i_h: no mask anywhere.

    A block of columns stays while the rows pass by it, and its sums stay in registers. Those of the rows collect in
    memory that no other program touches.
    """
    i_g, i_h = group_pair(i_pair, GROUPS)
    p_rows = p_sum + i_h * M
    p_columns = p_sum + i_g * M
    end = tl.minimum((i_g + 1) * GROUP, whole)
    o_m, o_n, o_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)

    for i_n in range(i_h * GROUP, tl.minimum((i_h + 1) * GROUP, whole), BLOCK_N):
        collected = tl.where(i_n > i_h * GROUP, BLOCK_M, 0)  # rows that hold sums of earlier columns
        b_n = tl.trans(load_rows(p_z, i_n, o_n, o_d, WIDTH))
        if FOLDED:
            b_columns = tl.zeros((BLOCK_M // 16, 8, BLOCK_N), tl.float32)
        else:
            b_columns = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for i_m in range(tl.maximum(i_g * GROUP, i_n + BLOCK_N), end, BLOCK_M):
            b_rows = tl.load(p_rows + i_m + o_m, mask=o_m < collected, other=0)
            if WIDTH == BLOCK_D:
                b_m = load_rows(p_z, i_m, o_m, o_d, WIDTH)
                b_s = dot(b_m, b_n, tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
            else:
                b_s = similarity(p_z, i_m, o_m, i_n, o_n, PRECISION, WIDTH, BLOCK_M, BLOCK_N, BLOCK_D)
            b_p = tl.exp2(b_s * b_scale)
            tl.store(p_rows + i_m + o_m, b_rows + tl.sum(b_p, 1))
            # Rows r and r + 8 lie in one thread: adding them halves the registers that wait for the end of the loop.
            if FOLDED:
                b_columns += tl.sum(tl.reshape(b_p, (BLOCK_M // 16, 2, 8, BLOCK_N)), 1)
            else:
                b_columns += b_p
        b_sum = tl.sum(tl.sum(b_columns, 0), 0) if FOLDED else tl.sum(b_columns, 0)
        if i_g == i_h:
            b_sum += tl.load(p_columns + i_n + o_n, mask=o_n < tl.where(collected > 0, BLOCK_N, 0), other=0)
        tl.store(p_columns + i_n + o_n, b_sum)
        tl.debug_barrier()  # other threads of this program load what these have stored


@triton.jit
def logsumexp_kernel(
    p_z, p_scale, p_sum, M, GROUP, GROUPS, EDGES,
    PAIRS: tl.constexpr, EXCLUDE_SELF: tl.constexpr, GUARDED: tl.constexpr, PRECISION: tl.constexpr,
    FOLDED: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Σ_j 2^s_ij in slots [GROUPS + 1, M]: over the columns of each group, and over the tiles that need a mask.

    Those are the diagonal ones and, where BLOCK_N does not divide M, the last columns and the last rows.
    """
    i = tl.program_id(0).to(tl.int64)
    b_scale = tl.load(p_scale)
    if GUARDED:
        if not fits_fixed_shift(b_scale, M):
            return
    b_scale *= LOG2E
    whole = M // BLOCK_N * BLOCK_N

    if i < EDGES:
        i_m = (EDGES - 1 - i) * BLOCK_M  # the last rows, which may meet every column, begin first
        b_sum = tl.zeros((BLOCK_M,), tl.float32)
        ragged = tl.where(whole < M, 1, 0)
        for i_k in tl.range(tl.where(i_m < whole, 1 + ragged, tl.cdiv(M, BLOCK_N)), num_stages=1):
            i_n = tl.where(i_m < whole, tl.where(i_k == 0, i_m // BLOCK_N * BLOCK_N, whole), i_k * BLOCK_N)
            _, b_sum = add_tile(
                p_z, i_m, i_n, M, b_scale, b_sum, b_sum, True, PAIRS, EXCLUDE_SELF, False,
                PRECISION, WIDTH, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
        o_m = i_m + tl.arange(0, BLOCK_M)
        tl.store(p_sum + tl.cast(M, tl.int64) * GROUPS + o_m, b_sum, mask=o_m < M)
    else:
        pairs_of_groups(
            p_z, p_sum, i - EDGES, b_scale, M, whole, GROUP, GROUPS,
            PRECISION, FOLDED, WIDTH, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip


@triton.jit
def online_kernel(
    p_z, p_scale, p_top, p_sum, M, COLUMNS,
    PAIRS: tl.constexpr, EXCLUDE_SELF: tl.constexpr, GUARDED: tl.constexpr, PRECISION: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Σ_j 2^(s_ij − top_i) and top_i, the maximum, over one split of COLUMNS columns, at [split, row]."""
    i_m = tl.program_id(0).to(tl.int64) * BLOCK_M
    i_split = tl.program_id(1).to(tl.int64)
    b_scale = tl.load(p_scale)
    if GUARDED:
        if fits_fixed_shift(b_scale, M):
            return
    b_scale *= LOG2E
    begin, end = i_split * COLUMNS, tl.minimum((i_split + 1) * COLUMNS, M)
    i_own, own, masked, skipped, whole = tiles_of_rows(i_m, begin, end, M, BLOCK_M, BLOCK_N)

    b_top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    b_sum = tl.zeros((BLOCK_M,), tl.float32)
    for i_k in tl.range(masked, num_stages=1):
        i_n = tl.where(i_k < own, i_own + i_k * BLOCK_N, whole)
        b_top, b_sum = add_tile(
            p_z, i_m, i_n, M, b_scale, b_top, b_sum, True, PAIRS, EXCLUDE_SELF, True,
            PRECISION, WIDTH, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    for i_k in range(begin, tl.minimum(end, whole) - skipped, BLOCK_N):
        i_n = i_k + tl.where(i_k >= i_own, skipped, 0)
        b_top, b_sum = add_tile(
            p_z, i_m, i_n, M, b_scale, b_top, b_sum, False, PAIRS, EXCLUDE_SELF, True,
            PRECISION, WIDTH, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip

    o_m = i_m + tl.arange(0, BLOCK_M)
    tl.store(p_sum + i_split * M + o_m, b_sum, mask=o_m < M)
    tl.store(p_top + i_split * M + o_m, b_top, mask=o_m < M)


@triton.jit
def merge_kernel(
    p_top, p_sum, p_cosine, p_scale, p_kept, p_lse, p_d, p_losses, M, GROUPS, WHOLE, SPLITS,
    PAIRS: tl.constexpr, SHIFT: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """From the slots' sums lse or, with PAIRS, d = lse − S_pos and losses = softplus(d); and what backward needs.

    That is kept [2, M], factor and shift: p_ij = factor_i 2^(s_ij − shift_i) are the probabilities of row i, its
    positive among them. Its logsumexp, one number, holds too few digits for them where logits are large.
    """
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < M
    b_scale = tl.load(p_scale)
    online = SHIFT == 1
    slots = SPLITS if SHIFT == 1 else GROUPS + 1
    if SHIFT == 2:
        online = not fits_fixed_shift(b_scale, M)
        slots = tl.where(online, SPLITS, slots)

    b_top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    b_sum = tl.zeros((BLOCK_M,), tl.float32)
    for i_slot in range(slots):
        o_slot = tl.cast(i_slot, tl.int64) * M + o_m
        b_part = tl.load(p_sum + o_slot, mask=m_m & (online | (i_slot == GROUPS) | (o_m < WHOLE)), other=0)
        b_part_top = tl.load(p_top + o_slot, mask=m_m & online, other=0)
        b_higher = tl.maximum(b_top, b_part_top)
        b_shift = tl.where(b_higher == -float("inf"), 0, b_higher)
        b_sum = b_sum * tl.exp2(b_top - b_shift) + b_part * tl.exp2(b_part_top - b_shift)
        b_top = b_higher
    b_log2 = b_top + tl.log2(b_sum)

    o_place = place_of_row(o_m, M, PAIRS)
    if PAIRS:
        b_positive = tl.load(p_cosine + o_m // 2, mask=m_m, other=0) * b_scale
        b_d = b_log2 * LN2 - b_positive
        b_higher = tl.where(online, tl.maximum(b_top, b_positive * LOG2E), b_top)
        b_sum = b_sum * tl.exp2(b_top - b_higher) + tl.exp2(b_positive * LOG2E - b_higher)
        b_top = b_higher
        tl.store(p_d + o_m, b_d, mask=m_m)
        tl.store(p_losses + o_place, log1p_exp(b_d), mask=m_m)
    else:
        tl.store(p_lse + o_m, b_log2 * LN2, mask=m_m)
    tl.store(p_kept + o_m, tl.where(b_sum == 0, 0, 1 / b_sum), mask=m_m)
    tl.store(p_kept + tl.cast(M, tl.int64) + o_m, tl.where(b_top == -float("inf"), 0, b_top), mask=m_m)


class Sums(NamedTuple):
    """What the forward gives: kept [2, M] as `merge_kernel` says, and lse or, with positives, d and losses [M]."""

    kept: Tensor
    lse: Tensor | None
    d: Tensor | None
    losses: Tensor | None


def logsumexp(z: Tensor, dim: int, scale: Tensor, cosine: Tensor | None, exclude_self: bool, shift: Shift) -> Sums:
    """log Σ_j exp(scale · z_i · z_j); with the cosine of each pair, neighbours in z, the positives are left out.

    z is [M, row_width], zero from column dim on. d and what is saved are in the order of z, losses in the order
    of the caller.
    """
    run = functools.partial(_logsumexp, z, dim, scale, cosine, exclude_self, shift)
    kernel = online_kernel if shift == Shift.ONLINE else logsumexp_kernel
    return run(chosen_tiles(Kernel.SUM, kernel, z, dim, run, int(shift), cosine is not None))


def _logsumexp(
    z: Tensor, dim: int, scale: Tensor, cosine: Tensor | None, exclude_self: bool, shift: Shift, tiles: Tiles
) -> Sums:
    m = z.shape[0]
    pairs = cosine is not None
    group, groups = groups_of_rows(z, dim, tiles) if shift != Shift.ONLINE else (0, 0)
    columns, splits = columns_of_splits(z, dim, tiles) if shift != Shift.FIXED else (0, 0)
    sums = scale.new_empty(max(groups + 1, splits), m)
    tops = scale.new_empty(splits, m)
    options = {"PAIRS": pairs, "EXCLUDE_SELF": exclude_self, "GUARDED": shift == Shift.DEVICE}
    options |= {"PRECISION": dot_precision(z), **tiles.options(z.shape[1])}
    edges = triton.cdiv(m, tiles.rows)
    lse, d, losses = (scale.new_empty(m) if wanted else None for wanted in (not pairs, pairs, pairs))
    found = Sums(scale.new_empty(2, m), lse, d, losses)
    with torch.cuda.device_of(z):
        if shift != Shift.ONLINE:
            logsumexp_kernel[(edges + groups * (groups + 1) // 2,)](
                *(z, scale, sums, m, group, groups, edges), FOLDED=tiles.folded, **options
            )
        if shift != Shift.FIXED:
            online_kernel[(edges, splits)](*(z, scale, tops, sums, m, columns), **options)
        merge_kernel[(triton.cdiv(m, 128),)](
            *(tops, sums, cosine, scale, *found, m, groups, m // tiles.columns * tiles.columns, splits),
            PAIRS=pairs,
            SHIFT=int(shift),
            BLOCK_M=128,
        )
    return found


def groups_of_rows(z: Tensor, dim: int, tiles: Tiles) -> tuple[int, int]:
    """Rows of a group, and groups: pairs of them for several programs on each processor, in slots of at most 2·D."""
    blocks = z.shape[0] // tiles.columns
    wanted = min(math.isqrt(12 * processors_of(z)) + 1, 2 * dim, blocks)
    group = triton.cdiv(blocks, max(wanted, 1))
    return group * tiles.columns, triton.cdiv(blocks, group) if blocks else 0


def columns_of_splits(z: Tensor, dim: int, tiles: Tiles) -> tuple[int, int]:
    """Columns of a split, and splits: enough programs for the device, in at most D / 8 partial sums of a row."""
    blocks = triton.cdiv(z.shape[0], tiles.columns)
    wanted = triton.cdiv(4 * processors_of(z), triton.cdiv(z.shape[0], tiles.rows))
    columns = triton.cdiv(blocks, max(1, min(wanted, dim // 8, blocks)))
    return columns * tiles.columns, triton.cdiv(blocks, columns)

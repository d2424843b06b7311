"""Masking in Triton: ranking by bisection on the bits of the keys, rows moved along and against an index.

Images and token sequences share two kernels; ops/triton_patches.py says how both are addressed.
"""

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from hsv_kernels.ops.masking import reference
from hsv_kernels.ops.patches import Strides, packed_strides, patch_strides
from hsv_kernels.ops.triton_patches import (
    Layout,
    layout_of,
    load_groups,
    place_of_groups,
    row_alignment,
    store_groups,
    within_groups,
)
from hsv_kernels.ops.triton_utils import Configuration, round_to, triton_type

__all__ = [
    "configurations",
    "gather_patches",
    "gather_tokens",
    "masked_sum",
    "random_masking",
    "restore_tokens",
    "scatter_patches",
    "scatter_tokens",
    "visible_tokens",
]

#: Patches of one image that a program ranks in registers; the reference ranks more of them, to the same bits.
MOST_PATCHES = 8_192


@triton.jit
def rows_of_program(N, BLOCK: tl.constexpr):
    """Sample and rows of this program: samples × blocks of rows lie along the first axis, the one without a limit."""
    blocks = tl.cdiv(N, BLOCK)
    i = tl.program_id(0).to(tl.int64)
    return i // blocks, i % blocks * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def random_masking_kernel(p_seed, p_offset, p_keep, p_restore, p_mask, first_index, L, K, BL: tl.constexpr):
    """One image: the K-th smallest key is found bit by bit, from the highest; ties go to the lowest positions."""
    i_b = tl.program_id(0).to(tl.int64)
    o_l = tl.arange(0, BL)
    m_l = o_l < L
    offset = tl.load(p_offset)

    word = tl.zeros((BL,), tl.uint32)
    image = word + (first_index + i_b).to(tl.uint32)
    low, high = word + offset.to(tl.uint32), word + (offset >> 32).to(tl.uint32)
    keys, _, _, _ = tl.philox(tl.load(p_seed), o_l.to(tl.uint32), image, low, high)

    threshold, bit = tl.full((), 0, tl.uint32), tl.full((), 1 << 31, tl.uint32)
    for _ in range(32):
        below = tl.sum((m_l & (keys < (threshold | bit))).to(tl.int32), 0)
        threshold = tl.where(below < K, threshold | bit, threshold)
        bit = bit >> 1

    below = m_l & (keys < threshold)
    tie = m_l & (keys == threshold)
    ties = K - tl.sum(below.to(tl.int32), 0)
    keep = below | (tie & (tl.cumsum(tie.to(tl.int32), 0) <= ties))
    place = tl.cumsum(keep.to(tl.int32), 0) - 1  # among the kept, where kept

    tl.store(p_keep + i_b * K + place, o_l.to(tl.int64), mask=keep)
    tl.store(p_restore + i_b * L + o_l, tl.where(keep, place, K + o_l - place - 1).to(tl.int64), mask=m_l)
    tl.store(p_mask + i_b * L + o_l, tl.where(keep, 0.0, 1.0), mask=m_l)


def random_masking(
    seed: Tensor, offset: Tensor, batch: int, num_patches: int, num_keep: int, first_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    if num_patches > MOST_PATCHES:
        return reference.random_masking(seed, offset, batch, num_patches, num_keep, first_index)
    ids_keep, ids_restore = seed.new_empty(batch, num_keep), seed.new_empty(batch, num_patches)
    mask = seed.new_empty(batch, num_patches, dtype=torch.float32)
    BL = triton.next_power_of_2(num_patches)
    with torch.cuda.device_of(seed):
        random_masking_kernel[batch,](
            *(seed, offset, ids_keep, ids_restore, mask, first_index, num_patches, num_keep),
            BL=BL,
            num_warps=ranking_warps(BL),
        )
    return ids_keep, ids_restore, mask


def ranking_warps(BL: int) -> int:
    """At most sixteen keys a thread; one warp, which needs no barrier, as far as 512."""
    return max(BL // 512, 1)


@triton.jit
def gather_kernel(
    p_in, p_ids, p_out, BATCH, GRID, GRID_ROW, GRID_COLUMN, ROW, COLUMN, CHANNEL, IDS_B, IDS_K, K,
    P: tl.constexpr, Q: tl.constexpr, C: tl.constexpr, I: tl.constexpr, V: tl.constexpr, A: tl.constexpr,
    R: tl.constexpr,
):  # fmt: skip
    """out[b, k] = patch ids[b, k] of the sample; a program moves R groups, which need not end with a patch."""
    G: tl.constexpr = P * Q * C // (I * V)
    blocks = tl.cdiv(tl.cast(K, tl.int64) * G, R)
    i = tl.program_id(0).to(tl.int64)
    i_b, first = i // blocks, i % blocks * R
    o_r = (first % G).to(tl.int32) + tl.arange(0, R)
    o_k, o_g = first // G + o_r // G, o_r % G
    m_r = o_k < K

    b_id = tl.load(p_ids + i_b * IDS_B + o_k * IDS_K, mask=m_r, other=0).to(tl.int32)  # [R]
    strides = (BATCH, GRID, GRID_ROW, GRID_COLUMN, ROW, COLUMN, CHANNEL)
    o_x = place_of_groups(i_b, b_id, o_g, strides, P, Q, C, I, V, A)
    b_x = load_groups(p_in, o_x, m_r, COLUMN, CHANNEL, I, V, A)  # [R, J, V]

    o_out = (i_b * K * G + first + tl.arange(0, R)) * (I * V)
    o_n, m_n = within_groups(I, V)
    tl.store(p_out + o_out[:, None, None] + o_n, b_x, mask=m_r[:, None, None] & m_n)


def gather_patches(images: Tensor, ids_keep: Tensor, p: int, q: int) -> Tensor:
    return _gather(images, ids_keep, patch_strides(images, p, q), (p, q, images.shape[1]))


def gather_tokens(tokens: Tensor, ids_keep: Tensor) -> Tensor:
    D = tokens.shape[2]
    return _gather(tokens, ids_keep, packed_strides(tokens, 1, D), (1, 1, D))


def _gather(source: Tensor, ids_keep: Tensor, strides: Strides, shape: tuple[int, int, int]) -> Tensor:
    B, K = ids_keep.shape
    out = source.new_empty(B, K, math.prod(shape))
    layout = layout_of(source, strides, shape)
    R = min(groups_at_a_time(layout), triton.next_power_of_2(K * layout.groups))
    with torch.cuda.device_of(source):
        gather_kernel[B * triton.cdiv(K * layout.groups, R),](
            *(source, ids_keep, out, *layout.strides, *ids_keep.stride(), K), **layout.constants, R=R
        )
    return out


def groups_at_a_time(layout: Layout) -> int:
    """Groups of 2,048 values, or one for each of 128 threads where that is more."""
    return max(128, 2048 // layout.values)


@triton.jit
def scatter_kernel(
    p_grad, p_ids, p_out, GRAD_B, GRAD_K, GRAD_N, IDS_B, IDS_K,
    BATCH, GRID, GRID_ROW, GRID_COLUMN, ROW, COLUMN, CHANNEL, L, K,
    P: tl.constexpr, Q: tl.constexpr, C: tl.constexpr, I: tl.constexpr, V: tl.constexpr, A: tl.constexpr,
    ALIGNED: tl.constexpr, BL: tl.constexpr, BG: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Every patch of the output written once: the row of `grad` that was taken from it, or zeros."""
    G: tl.constexpr = P * Q * C // (I * V)
    i_b, o_l = rows_of_program(L, BL)

    source = tl.full((BL,), -1, tl.int64)
    for k in range(0, K, BK):
        o_k = k + tl.arange(0, BK).to(tl.int64)
        b_id = tl.load(p_ids + i_b * IDS_B + o_k * IDS_K, mask=o_k < K, other=-1)  # [BK]
        found = tl.where(b_id[None, :] == o_l[:, None], o_k[None, :], -1)
        source = tl.maximum(source, tl.max(found, 1))

    strides = (BATCH, GRID, GRID_ROW, GRID_COLUMN, ROW, COLUMN, CHANNEL)
    o_n, m_n = within_groups(I, V)
    every = tl.zeros((BL, BG), tl.int32)
    o_l = tl.reshape(o_l.to(tl.int32)[:, None] + every, [BL * BG])
    o_row = tl.reshape((i_b * GRAD_B + source * GRAD_K)[:, None] + every, [BL * BG])
    taken = tl.reshape(source[:, None] + every, [BL * BG]) >= 0
    for g in range(0, G, BG):
        o_g = tl.reshape(g + tl.arange(0, BG)[None, :] + every, [BL * BG])
        m_r = (o_l < L) & (o_g < G)
        o_grad = tl.multiple_of(o_row + o_g.to(tl.int64) * (I * V) * GRAD_N, ALIGNED)
        p_values = p_grad + o_grad[:, None, None] + o_n * GRAD_N
        b_x = tl.load(p_values, mask=(m_r & taken)[:, None, None] & m_n, other=0.0)  # [BL · BG, J, V]
        o_x = place_of_groups(i_b, o_l, o_g, strides, P, Q, C, I, V, A)
        store_groups(p_out, o_x, b_x, m_r, COLUMN, CHANNEL, I, V, A)


def scatter_patches(grad: Tensor, ids_keep: Tensor, C: int, H: int, W: int, p: int, q: int) -> Tensor:
    out = grad.new_empty(grad.shape[0], C, H, W)
    _scatter(grad, ids_keep, out, patch_strides(out, p, q), (p, q, C), (H // p) * (W // q))
    return out


def scatter_tokens(grad: Tensor, ids_keep: Tensor, num_tokens: int) -> Tensor:
    B, _, D = grad.shape
    out = grad.new_empty(B, num_tokens, D)
    _scatter(grad, ids_keep, out, packed_strides(out, 1, D), (1, 1, D), num_tokens)
    return out


def _scatter(
    grad: Tensor, ids_keep: Tensor, out: Tensor, strides: Strides, shape: tuple[int, int, int], L: int
) -> None:
    B, K = ids_keep.shape
    layout = layout_of(out, strides, shape)
    BL, BG = scatter_tile(layout, L)
    with torch.cuda.device_of(grad):
        scatter_kernel[B * triton.cdiv(L, BL),](
            *(grad, ids_keep, out, *grad.stride(), *ids_keep.stride(), *layout.strides, L, K),
            **layout.constants,
            **{"ALIGNED": row_alignment(grad, layout.V), "BL": BL, "BG": BG, "BK": search_block(BL, K)},
        )


def scatter_tile(layout: Layout, L: int) -> tuple[int, int]:
    """[patches, groups] of a tile: all groups of a patch, or a power of two that divides their number."""
    most, G = groups_at_a_time(layout), layout.groups
    BG = min(most, triton.next_power_of_2(G))
    if G & -G >= 32:
        BG = min(most, G & -G)
    return min(triton.next_power_of_2(L), most // BG), BG


def search_block(BL: int, K: int) -> int:
    """How many of K numbers are compared with BL rows at a time."""
    return min(triton.next_power_of_2(K), 2048 // BL, 64)


@triton.jit
def restore_kernel(
    p_tokens, p_ids, p_fill, p_out, TOKENS_B, TOKENS_K, TOKENS_D, IDS_B, IDS_L, L, K,
    D: tl.constexpr, ALIGNED: tl.constexpr, BL: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """out[b, l] = tokens[b, ids[b, l]] below K, the mask token elsewhere."""
    i_b, o_l = rows_of_program(L, BL)
    o_d = tl.program_id(1).to(tl.int64) * BD + tl.arange(0, BD)
    m_l, m_d = o_l < L, o_d < D

    b_id = tl.load(p_ids + i_b * IDS_B + o_l * IDS_L, mask=m_l, other=0)  # [BL]
    visible = b_id < K
    b_fill = tl.load(p_fill + o_d, mask=m_d).to(tl.float32)
    o_row = tl.multiple_of(i_b * TOKENS_B + b_id * TOKENS_K, ALIGNED)
    p_values = p_tokens + o_row[:, None] + o_d[None, :] * TOKENS_D
    b_x = tl.load(p_values, mask=(m_l & visible)[:, None] & m_d[None, :]).to(tl.float32)

    b_x = round_to(tl.where(visible[:, None], b_x, b_fill[None, :]), p_out.dtype.element_ty)
    tl.store(p_out + (i_b * L + o_l[:, None]) * D + o_d[None, :], b_x, mask=m_l[:, None] & m_d[None, :])


def restore_tokens(tokens: Tensor, ids_restore: Tensor, mask_token: Tensor) -> Tensor:
    B, K, D = tokens.shape
    L = ids_restore.shape[1]
    out = tokens.new_empty(B, L, D, dtype=torch.promote_types(tokens.dtype, mask_token.dtype))
    BL, BD = tile(L, D)
    with torch.cuda.device_of(tokens):
        restore_kernel[B * triton.cdiv(L, BL), triton.cdiv(D, BD)](
            *(tokens, ids_restore, mask_token.contiguous(), out, *tokens.stride(), *ids_restore.stride(), L, K),
            **{"D": D, "ALIGNED": row_alignment(tokens, 8), "BL": BL, "BD": BD},
        )
    return out


@triton.jit
def visible_kernel(
    p_grad, p_ids, p_out, GRAD_B, GRAD_L, GRAD_D, IDS_B, IDS_L, L, K,
    D: tl.constexpr, ALIGNED: tl.constexpr, BL: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """out[b, ids[b, l]] = grad[b, l] below K; ids is a permutation, so each row is written once."""
    i_b, o_l = rows_of_program(L, BL)
    o_d = tl.program_id(1).to(tl.int64) * BD + tl.arange(0, BD)

    b_id = tl.load(p_ids + i_b * IDS_B + o_l * IDS_L, mask=o_l < L, other=K)  # [BL]
    m = (b_id < K)[:, None] & (o_d < D)[None, :]
    o_row = tl.multiple_of(i_b * GRAD_B + o_l * GRAD_L, ALIGNED)
    b_g = tl.load(p_grad + o_row[:, None] + o_d[None, :] * GRAD_D, mask=m).to(tl.float32)

    p_row = p_out + (i_b * K + b_id[:, None]) * D
    tl.store(p_row + o_d[None, :], round_to(b_g, p_out.dtype.element_ty), mask=m)


def visible_tokens(grad: Tensor, ids_restore: Tensor, num_keep: int, dtype: torch.dtype) -> Tensor:
    B, L, D = grad.shape
    out = grad.new_empty(B, num_keep, D, dtype=dtype)
    BL, BD = tile(L, D)
    with torch.cuda.device_of(grad):
        visible_kernel[B * triton.cdiv(L, BL), triton.cdiv(D, BD)](
            *(grad, ids_restore, out, *grad.stride(), *ids_restore.stride(), L, num_keep),
            **{"D": D, "ALIGNED": row_alignment(grad, 8), "BL": BL, "BD": BD},
        )
    return out


@triton.jit
def masked_sum_kernel(
    p_grad, p_ids, p_partial, GRAD_B, GRAD_L, GRAD_D, IDS_B, IDS_L, L, K,
    D: tl.constexpr, ALIGNED: tl.constexpr, BL: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """partial[b] = Σ grad[b, l] over the rows with ids[b, l] ≥ K, in the order of l."""
    i_b, i_d = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_d = i_d * BD + tl.arange(0, BD)

    b_sum = tl.zeros((BD,), tl.float32)
    for l in range(0, L, BL):
        o_l = l + tl.arange(0, BL).to(tl.int64)
        b_id = tl.load(p_ids + i_b * IDS_B + o_l * IDS_L, mask=o_l < L, other=-1)  # [BL]
        m = (b_id >= K)[:, None] & (o_d < D)[None, :]
        o_row = tl.multiple_of(i_b * GRAD_B + o_l * GRAD_L, ALIGNED)
        p_values = p_grad + o_row[:, None] + o_d[None, :] * GRAD_D
        b_sum += tl.sum(tl.load(p_values, mask=m, other=0.0).to(tl.float32), 0)

    tl.store(p_partial + i_b * D + o_d, b_sum, mask=o_d < D)


def masked_sum(grad: Tensor, ids_restore: Tensor, num_keep: int) -> Tensor:
    B, L, D = grad.shape
    partial = grad.new_empty(B, D, dtype=torch.float32)
    BL, BD = tile(L, D)
    with torch.cuda.device_of(grad):
        masked_sum_kernel[B, triton.cdiv(D, BD)](
            *(grad, ids_restore, partial, *grad.stride(), *ids_restore.stride(), L, num_keep),
            **{"D": D, "ALIGNED": row_alignment(grad, 8), "BL": BL, "BD": BD},
        )
    return partial.sum(0)


def tile(rows: int, columns: int) -> tuple[int, int]:
    """[rows, columns] of a tile of at most 2,048 values, wide before high."""
    wide = min(triton.next_power_of_2(columns), 256)
    return min(triton.next_power_of_2(rows), 2048 // wide), wide


def configurations() -> Iterator[Configuration]:
    """Specialisations for ahead-of-time compilation: the usual patches, token widths and types."""
    counters = dict.fromkeys(("p_seed", "p_offset", "p_keep", "p_restore"), "*i64")
    for BL in (64, 256, MOST_PATCHES):
        signature = {**counters, "p_mask": "*fp32", "first_index": "i64", "L": "i32", "K": "i32"}
        yield Configuration(random_masking_kernel, signature, {"BL": BL}, ranking_warps(BL), 3)

    for dtype, shape, memory_format in (
        *((dtype, (3, 224, 224, 16), torch.contiguous_format) for dtype in (torch.float32, torch.bfloat16)),
        *((dtype, (3, 224, 224, 16), torch.channels_last) for dtype in (torch.float32, torch.bfloat16)),
        (torch.bfloat16, (3, 224, 224, 14), torch.contiguous_format),
        (torch.float32, (1, 28, 28, 4), torch.contiguous_format),
        (torch.float32, (13, 32, 32, 4), torch.contiguous_format),
    ):
        C, H, W, p = shape
        images = torch.empty(1, C, H, W, dtype=dtype, device="meta", memory_format=memory_format)
        yield from _moves(images, patch_strides(images, p, p), (p, p, C), (H // p) * (W // p))
    for dtype, D in ((torch.bfloat16, 768), (torch.float32, 100)):
        tokens = torch.empty(1, 196, D, dtype=dtype, device="meta")
        yield from _moves(tokens, packed_strides(tokens, 1, D), (1, 1, D), 196)

    ids = dict.fromkeys(("IDS_B", "L", "K"), "i32") | {"p_ids": "*i64"}
    for narrow, wide, D in (("bf16", "fp32", 512), ("fp16", "fp16", 200)):
        BL, BD = tile(196, D)
        shape = {"D": D, "ALIGNED": 8, "BL": BL, "BD": BD, "IDS_L": 1}
        signature = {**ids, "p_tokens": f"*{narrow}", "p_fill": f"*{wide}", "p_out": f"*{wide}"}
        strides = dict.fromkeys(("TOKENS_B", "TOKENS_K"), "i32")
        yield Configuration(restore_kernel, {**signature, **strides}, {**shape, "TOKENS_D": 1}, 4, 3)
        signature = {**ids, "p_grad": f"*{wide}", "GRAD_B": "i32", "GRAD_L": "i32"}
        yield Configuration(visible_kernel, {**signature, "p_out": f"*{narrow}"}, {**shape, "GRAD_D": 1}, 4, 3)
        yield Configuration(masked_sum_kernel, {**signature, "p_partial": "*fp32"}, {**shape, "GRAD_D": 1}, 4, 3)


def _moves(tensor: Tensor, strides: Strides, shape: tuple[int, int, int], L: int) -> Iterator[Configuration]:
    """A quarter of the patches of `tensor` gathered, and scattered back."""
    pointer, K, layout = f"*{triton_type(tensor.dtype)}", max(1, L // 4), layout_of(tensor, strides, shape)
    BL, BG = scatter_tile(layout, L)
    signature = {"p_ids": "*i64", "p_out": pointer, "IDS_B": "i32", "K": "i32", **layout.signature}
    constants = {**layout.constants, **layout.unit_strides, "IDS_K": 1}
    yield Configuration(
        gather_kernel, {**signature, "p_in": pointer}, {**constants, "R": groups_at_a_time(layout)}, 4, 3
    )
    grad = {"p_grad": pointer, "GRAD_B": "i32", "GRAD_K": "i32", "L": "i32"}
    search = {"GRAD_N": 1, "ALIGNED": layout.V, "BL": BL, "BG": BG, "BK": search_block(BL, K)}
    yield Configuration(scatter_kernel, {**signature, **grad}, {**constants, **search}, 4, 3)

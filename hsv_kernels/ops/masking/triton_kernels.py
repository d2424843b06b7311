"""Masking in Triton: ranking by bisection on the bits of the keys, rows moved along and against an index.

Images and token sequences share two kernels: element (y, x, c) of patch l of sample b lies at

    b·BATCH + (l // GRID)·p·ROW + (l % GRID)·q·COLUMN + y·ROW + x·COLUMN + c·CHANNEL,

and a token is a patch of one pixel in a grid of width 1.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from hsv_kernels.ops.masking import reference
from hsv_kernels.ops.triton_utils import Configuration, round_to

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


@triton.jit
def gather_kernel(
    p_in, p_ids, p_out, BATCH, ROW, COLUMN, CHANNEL, IDS_B, IDS_K, K, GRID, N,
    C: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out[b, k] = patch ids[b, k] of the image, [B, K, N] in (y, x, c) order."""
    i_b, o_k = rows_of_program(K, BK)
    o_n = tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN)
    m_k = o_k < K

    b_id = tl.load(p_ids + i_b * IDS_B + o_k * IDS_K, mask=m_k, other=0)  # [BK]
    corner = (b_id // GRID) * P * ROW + (b_id % GRID) * Q * COLUMN
    pixel = (o_n // (Q * C)) * ROW + (o_n // C % Q) * COLUMN + (o_n % C) * CHANNEL
    m = m_k[:, None] & (o_n < N)[None, :]

    b_x = tl.load(p_in + i_b * BATCH + corner[:, None] + pixel[None, :], mask=m)
    tl.store(p_out + (i_b * K + o_k[:, None]) * N + o_n[None, :], b_x, mask=m)


@triton.jit
def scatter_kernel(
    p_grad, p_ids, p_out, GRAD_B, GRAD_K, GRAD_N, IDS_B, IDS_K, BATCH, ROW, COLUMN, CHANNEL, L, K, GRID, N,
    C: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, PLANAR: tl.constexpr,
    BL: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Every patch of the output written once: the row of `grad` that was taken from it, or zeros."""
    i_b, o_l = rows_of_program(L, BL)

    source = tl.full((BL,), -1, tl.int64)
    for k in range(0, K, BK):
        o_k = k + tl.arange(0, BK).to(tl.int64)
        b_id = tl.load(p_ids + i_b * IDS_B + o_k * IDS_K, mask=o_k < K, other=-1)  # [BK]
        found = tl.where(b_id[None, :] == o_l[:, None], o_k[None, :], -1)
        source = tl.maximum(source, tl.max(found, 1))

    corner = (o_l // GRID) * P * ROW + (o_l % GRID) * Q * COLUMN
    for n in range(0, N, BN):
        o_n = n + tl.arange(0, BN).to(tl.int64)
        if PLANAR:  # along the rows of the image, whose planes are far apart
            y, x, c = o_n // Q % P, o_n % Q, o_n // (P * Q)
        else:
            y, x, c = o_n // (Q * C), o_n // C % Q, o_n % C
        m = (o_l < L)[:, None] & (o_n < N)[None, :]
        value = ((y * Q + x) * C + c) * GRAD_N
        p_row = p_grad + i_b * GRAD_B + source[:, None] * GRAD_K
        b_g = tl.load(p_row + value[None, :], mask=m & (source >= 0)[:, None], other=0.0)
        pixel = y * ROW + x * COLUMN + c * CHANNEL
        tl.store(p_out + i_b * BATCH + corner[:, None] + pixel[None, :], b_g, mask=m)


@triton.jit
def restore_kernel(
    p_tokens, p_ids, p_fill, p_out, TOKENS_B, TOKENS_K, TOKENS_D, IDS_B, IDS_L, L, K, D,
    BL: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """out[b, l] = tokens[b, ids[b, l]] below K, the mask token elsewhere."""
    i_b, o_l = rows_of_program(L, BL)
    o_d = tl.program_id(1).to(tl.int64) * BD + tl.arange(0, BD)
    m_l, m_d = o_l < L, o_d < D

    b_id = tl.load(p_ids + i_b * IDS_B + o_l * IDS_L, mask=m_l, other=0)  # [BL]
    visible = b_id < K
    b_fill = tl.load(p_fill + o_d, mask=m_d).to(tl.float32)
    p_row = p_tokens + i_b * TOKENS_B + b_id[:, None] * TOKENS_K
    b_x = tl.load(p_row + o_d[None, :] * TOKENS_D, mask=(m_l & visible)[:, None] & m_d[None, :]).to(tl.float32)

    b_x = round_to(tl.where(visible[:, None], b_x, b_fill[None, :]), p_out.dtype.element_ty)
    tl.store(p_out + (i_b * L + o_l[:, None]) * D + o_d[None, :], b_x, mask=m_l[:, None] & m_d[None, :])


@triton.jit
def visible_kernel(
    p_grad, p_ids, p_out, GRAD_B, GRAD_L, GRAD_D, IDS_B, IDS_L, L, K, D, BL: tl.constexpr, BD: tl.constexpr
):
    """out[b, ids[b, l]] = grad[b, l] below K; ids is a permutation, so each row is written once."""
    i_b, o_l = rows_of_program(L, BL)
    o_d = tl.program_id(1).to(tl.int64) * BD + tl.arange(0, BD)

    b_id = tl.load(p_ids + i_b * IDS_B + o_l * IDS_L, mask=o_l < L, other=K)  # [BL]
    m = (b_id < K)[:, None] & (o_d < D)[None, :]
    b_g = tl.load(p_grad + i_b * GRAD_B + o_l[:, None] * GRAD_L + o_d[None, :] * GRAD_D, mask=m).to(tl.float32)

    p_row = p_out + (i_b * K + b_id[:, None]) * D
    tl.store(p_row + o_d[None, :], round_to(b_g, p_out.dtype.element_ty), mask=m)


@triton.jit
def masked_sum_kernel(
    p_grad, p_ids, p_partial, GRAD_B, GRAD_L, GRAD_D, IDS_B, IDS_L, L, K, D, BL: tl.constexpr, BD: tl.constexpr
):
    """partial[b] = Σ grad[b, l] over the rows with ids[b, l] ≥ K, in the order of l."""
    i_b, i_d = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_d = i_d * BD + tl.arange(0, BD)

    b_sum = tl.zeros((BD,), tl.float32)
    for l in range(0, L, BL):
        o_l = l + tl.arange(0, BL).to(tl.int64)
        b_id = tl.load(p_ids + i_b * IDS_B + o_l * IDS_L, mask=o_l < L, other=-1)  # [BL]
        m = (b_id >= K)[:, None] & (o_d < D)[None, :]
        p_rows = p_grad + i_b * GRAD_B + o_l[:, None] * GRAD_L
        b_sum += tl.sum(tl.load(p_rows + o_d[None, :] * GRAD_D, mask=m, other=0.0).to(tl.float32), 0)

    tl.store(p_partial + i_b * D + o_d, b_sum, mask=o_d < D)


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


def tile(rows: int, columns: int) -> tuple[int, int]:
    """[rows, columns] of a tile of at most 2,048 values, wide before high."""
    wide = min(triton.next_power_of_2(columns), 256)
    return min(triton.next_power_of_2(rows), 2048 // wide), wide


def search_block(BL: int, K: int) -> int:
    """How many of K numbers are compared with BL rows at a time."""
    return min(triton.next_power_of_2(K), 2048 // BL, 64)


def gather_patches(images: Tensor, ids_keep: Tensor, p: int, q: int) -> Tensor:
    B, C, _, W = images.shape
    K, N = ids_keep.shape[1], p * q * C
    out = images.new_empty(B, K, N)
    BK, BN = tile(K, N)
    batch, channel, row, column = images.stride()
    with torch.cuda.device_of(images):
        gather_kernel[B * triton.cdiv(K, BK), triton.cdiv(N, BN)](
            *(images, ids_keep, out, batch, row, column, channel, *ids_keep.stride(), K, W // q, N),
            **{"C": C, "P": p, "Q": q, "BK": BK, "BN": BN},
        )
    return out


def scatter_patches(grad: Tensor, ids_keep: Tensor, C: int, H: int, W: int, p: int, q: int) -> Tensor:
    out = grad.new_empty(grad.shape[0], C, H, W)
    _scatter(grad, ids_keep, out, p, q, planar=True)
    return out


def _scatter(grad: Tensor, ids_keep: Tensor, out: Tensor, p: int, q: int, *, planar: bool) -> None:
    B, C, H, W = out.shape
    L, K, N = (H // p) * (W // q), ids_keep.shape[1], p * q * C
    BL, BN = tile(L, N)
    batch, channel, row, column = out.stride()
    with torch.cuda.device_of(grad):
        scatter_kernel[B * triton.cdiv(L, BL),](
            *(grad, ids_keep, out, *grad.stride(), *ids_keep.stride(), batch, row, column, channel, L, K, W // q, N),
            **{"C": C, "P": p, "Q": q, "PLANAR": planar, "BL": BL, "BN": BN},
            BK=search_block(BL, K),
        )


def as_images(tokens: Tensor) -> Tensor:
    """[B, L, D] as images [B, D, L, 1] of which each pixel is a patch."""
    return tokens.mT.unsqueeze(3)


def gather_tokens(tokens: Tensor, ids_keep: Tensor) -> Tensor:
    return gather_patches(as_images(tokens), ids_keep, 1, 1)


def scatter_tokens(grad: Tensor, ids_keep: Tensor, num_tokens: int) -> Tensor:
    B, _, D = grad.shape
    out = grad.new_empty(B, num_tokens, D)
    _scatter(grad, ids_keep, as_images(out), 1, 1, planar=False)
    return out


def restore_tokens(tokens: Tensor, ids_restore: Tensor, mask_token: Tensor) -> Tensor:
    B, K, D = tokens.shape
    L = ids_restore.shape[1]
    out = tokens.new_empty(B, L, D, dtype=torch.promote_types(tokens.dtype, mask_token.dtype))
    BL, BD = tile(L, D)
    with torch.cuda.device_of(tokens):
        restore_kernel[B * triton.cdiv(L, BL), triton.cdiv(D, BD)](
            *(tokens, ids_restore, mask_token.contiguous(), out, *tokens.stride(), *ids_restore.stride(), L, K, D),
            **{"BL": BL, "BD": BD},
        )
    return out


def visible_tokens(grad: Tensor, ids_restore: Tensor, num_keep: int, dtype: torch.dtype) -> Tensor:
    B, L, D = grad.shape
    out = grad.new_empty(B, num_keep, D, dtype=dtype)
    BL, BD = tile(L, D)
    with torch.cuda.device_of(grad):
        visible_kernel[B * triton.cdiv(L, BL), triton.cdiv(D, BD)](
            *(grad, ids_restore, out, *grad.stride(), *ids_restore.stride(), L, num_keep, D),
            **{"BL": BL, "BD": BD},
        )
    return out


def masked_sum(grad: Tensor, ids_restore: Tensor, num_keep: int) -> Tensor:
    B, L, D = grad.shape
    partial = grad.new_empty(B, D, dtype=torch.float32)
    BL, BD = tile(L, D)
    with torch.cuda.device_of(grad):
        masked_sum_kernel[B, triton.cdiv(D, BD)](
            *(grad, ids_restore, partial, *grad.stride(), *ids_restore.stride(), L, num_keep, D),
            **{"BL": BL, "BD": BD},
        )
    return partial.sum(0)


def configurations() -> Iterator[Configuration]:
    """Specialisations for ahead-of-time compilation: the usual patches, token widths and types."""
    counters = dict.fromkeys(("p_seed", "p_offset", "p_keep", "p_restore"), "*i64")
    for BL in (64, 256, MOST_PATCHES):
        signature = {**counters, "p_mask": "*fp32", "first_index": "i64", "L": "i32", "K": "i32"}
        yield Configuration(random_masking_kernel, signature, {"BL": BL}, ranking_warps(BL), 3)

    ids = {"p_ids": "*i64", "IDS_B": "i64", "IDS_K": "i64"}
    image = {"BATCH": "i64", "ROW": "i64", "COLUMN": "i64", "CHANNEL": "i64"}
    for pointer, (C, P, Q) in (
        *(("*fp32", (3, 16, 16)), ("*bf16", (3, 16, 16))),
        *(("*fp32", (1, 4, 4)), ("*bf16", (768, 1, 1))),
    ):
        (BK, BN), BL = tile(49, C * P * Q), tile(196, C * P * Q)[0]
        signature = {**ids, **image, "p_in": pointer, "p_out": pointer, "K": "i32", "GRID": "i32", "N": "i32"}
        shape = {"C": C, "P": P, "Q": Q, "BN": BN}
        yield Configuration(gather_kernel, signature, {**shape, "BK": BK}, 4, 3)
        grad = {"p_grad": pointer, "GRAD_B": "i64", "GRAD_K": "i64", "GRAD_N": "i64", "L": "i32"}
        signature = {name: kind for name, kind in signature.items() if name != "p_in"}
        search = {"PLANAR": P > 1, "BL": BL, "BK": search_block(BL, 49)}
        yield Configuration(scatter_kernel, {**signature, **grad}, {**shape, **search}, 4, 3)

    ids = {"p_ids": "*i64", "IDS_B": "i64", "IDS_L": "i64", "L": "i32", "K": "i32", "D": "i32"}
    BL, BD = tile(196, 512)
    for narrow, wide in (("bf16", "fp32"), ("fp16", "fp16")):
        tokens = {"p_tokens": f"*{narrow}", "TOKENS_B": "i64", "TOKENS_K": "i64", "TOKENS_D": "i64"}
        signature = {**ids, **tokens, "p_fill": f"*{wide}", "p_out": f"*{wide}"}
        yield Configuration(restore_kernel, signature, {"BL": BL, "BD": BD}, 4, 3)
        signature = {**ids, "p_grad": f"*{wide}", "GRAD_B": "i64", "GRAD_L": "i64", "GRAD_D": "i64"}
        yield Configuration(visible_kernel, {**signature, "p_out": f"*{narrow}"}, {"BL": BL, "BD": BD}, 4, 3)
        yield Configuration(masked_sum_kernel, {**signature, "p_partial": "*fp32"}, {"BL": BL, "BD": BD}, 4, 3)

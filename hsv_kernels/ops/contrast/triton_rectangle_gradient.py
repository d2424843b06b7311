"""The keys' gradient of logsumexps of queries against keys in Triton: Σ_i W_ij q_i, W recomputed tile by tile."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hsv_kernels.ops.contrast.rectangle import Form, Saved
from hsv_kernels.ops.contrast.triton_rectangle_tiles import (
    excluded,
    is_candidate,
    key_gradient_tiles,
    selection,
    similarity_to_keys,
    split,
    whole_chunks,
)
from hsv_kernels.ops.contrast.triton_tiles import LOG2E, gradient_unit, load_rows, padded, rows_of_tile
from hsv_kernels.ops.triton_utils import architecture_of, dot, dot_precision, round_to

__all__ = ["key_gradient", "key_gradient_kernel"]


@triton.jit
def add_queries(
    b_gradient, p_q, p_k, p_positive, p_q_labels, p_k_labels, p_top, p_weight, p_h, b_scale, i_m, o_m, i_n, o_d,
    QUERIES, SELF_OFFSET, MASKED: tl.constexpr, EXCLUDE_SELF: tl.constexpr, POSITIVE: tl.constexpr,
    LABELS: tl.constexpr, PRECISION: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Σ_i W_ij q_i with the tile of queries that begins at i_n."""
    o_n = rows_of_tile(i_n, QUERIES, BLOCK_N) if MASKED else tl.arange(0, BLOCK_N)
    b_s = b_scale * similarity_to_keys(
        p_k, i_m, o_m, p_q, i_n, o_n, WIDTH, False, PRECISION, WIDTH, BLOCK_M, BLOCK_N, BLOCK_D
    )
    m_n = tl.arange(0, BLOCK_N) < QUERIES - i_n if MASKED else None
    b_weight = tl.load(p_weight + i_n + o_n, mask=m_n, other=0 if MASKED else None)
    b_w = b_weight[None, :] * tl.exp2(b_s - tl.load(p_top + i_n + o_n)[None, :])
    if MASKED:
        o_key = (i_m + o_m).to(tl.int32)[:, None]
        o_query = (i_n + o_n).to(tl.int32)[None, :]
        m_mn = is_candidate(
            p_positive, p_q_labels, p_k_labels, tl.full((BLOCK_M, BLOCK_N), 1, tl.int1), o_query, o_key,
            SELF_OFFSET, EXCLUDE_SELF, False, LABELS,
        )  # fmt: skip
        b_w = tl.where(m_mn, b_w, 0)
        if POSITIVE:
            b_h = tl.load(p_h + i_n + o_n, mask=m_n, other=0)
            b_w = tl.where(tl.load(p_positive + o_query).to(tl.int32) == o_key, b_h[None, :], b_w)
    b_q = load_rows(p_q, i_n, o_n, o_d, WIDTH)
    return dot(round_to(b_w, p_q.dtype.element_ty), b_q, b_gradient, PRECISION)


@triton.jit
def key_gradient_kernel(
    p_q, p_k, p_scale, p_positive, p_q_labels, p_k_labels, p_top, p_weight, p_h, p_gradient,
    QUERIES, KEYS, D, TILES, SELF_OFFSET,
    EXCLUDE_SELF: tl.constexpr, POSITIVE: tl.constexpr, LABELS: tl.constexpr, PRECISION: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Σ_i W_ij q_i over one split of the queries and one chunk of D, where W_ij = weight_i 2^(s_ij − top_i).

    Rows are keys, and W is h_i where key j is the positive of query i. With positives or labels every tile of queries
    is masked, otherwise those of column self alone.
    """
    i_m = tl.program_id(0).to(tl.int64) * BLOCK_M
    i_split = tl.program_id(1).to(tl.int64)
    o_m = rows_of_tile(i_m, KEYS, BLOCK_M)
    o_d = (0 if WIDTH == BLOCK_D else tl.program_id(2) * BLOCK_D) + tl.arange(0, BLOCK_D)  # 0: one load serves both
    b_scale = tl.load(p_scale) * LOG2E

    begin = i_split * TILES
    end = tl.minimum(begin + TILES, tl.cdiv(QUERIES, BLOCK_N))
    full = tl.minimum(end, QUERIES // BLOCK_N)
    first, last = full, full
    if POSITIVE or LABELS:
        first = begin
    elif EXCLUDE_SELF:
        first = tl.minimum(tl.maximum((i_m - SELF_OFFSET) // BLOCK_N, begin), full)
        last = tl.minimum(tl.maximum((i_m - SELF_OFFSET + BLOCK_M - 1) // BLOCK_N + 1, first), full)

    b_gradient = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for i in range(begin, full - (last - first)):
        i_n = tl.where(i < first, i, i + last - first) * BLOCK_N
        b_gradient = add_queries(
            b_gradient, p_q, p_k, p_positive, p_q_labels, p_k_labels, p_top, p_weight, p_h, b_scale, i_m, o_m, i_n, o_d,
            QUERIES, SELF_OFFSET, False, EXCLUDE_SELF, POSITIVE, LABELS, PRECISION, WIDTH, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    for i in range(first, last + end - full):
        i_n = tl.where(i < last, i, i + full - last) * BLOCK_N
        b_gradient = add_queries(
            b_gradient, p_q, p_k, p_positive, p_q_labels, p_k_labels, p_top, p_weight, p_h, b_scale, i_m, o_m, i_n, o_d,
            QUERIES, SELF_OFFSET, True, EXCLUDE_SELF, POSITIVE, LABELS, PRECISION, WIDTH, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip

    o_part = i_split * KEYS + i_m + tl.arange(0, BLOCK_M)
    m_md = (tl.arange(0, BLOCK_M) < KEYS - i_m)[:, None] & (o_d < D)[None, :]
    tl.store(p_gradient + o_part[:, None] * D + o_d[None, :], b_gradient, mask=m_md)


def key_gradient(
    g: Tensor, h: Tensor | None, q: Tensor, k: Tensor, scale: Tensor, form: Form, saved: Saved, besides: Tensor | None
) -> Tensor:
    """dk [m, D] plus `besides`, of the dtype of k; g and h [n] are the gradients of lse and of positive columns."""
    (n, dim), m = q.shape, len(k)
    dtype = torch.bfloat16 if form.bfloat16 else q.dtype
    tiles = key_gradient_tiles(architecture_of(q), dtype, dim)
    queries, keys = (padded(x.to(dtype), whole_chunks(dim, tiles)) for x in (q, k))
    chunks = triton.cdiv(dim, tiles.dims)
    per_split, splits = split(q, m, n, tiles, chunks)
    unit = gradient_unit(dtype, 2.0**14, g, *(() if h is None else (h,)))
    tops, log2_sum = saved.log2_sum.contiguous().unbind()

    parts = scale.new_empty(splits, m, dim)
    with torch.cuda.device_of(q):
        key_gradient_kernel[(triton.cdiv(m, tiles.rows), splits, chunks)](
            *(queries, keys, scale, *selection(form), tops, g / unit * torch.exp2(-log2_sum)),
            *(None if h is None else h / unit, parts, n, m, dim, per_split, max(-n, min(form.self_offset, m))),
            **excluded(form),
            PRECISION=dot_precision(q),
            **tiles.options(whole_chunks(dim, tiles)),
        )
    dk = (parts[0] if splits == 1 else parts.sum(0)).mul_(scale * unit)
    if besides is not None:
        dk += besides
    return dk.to(k.dtype)

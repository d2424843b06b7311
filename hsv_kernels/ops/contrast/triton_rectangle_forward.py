"""logsumexp of queries against keys in Triton: sums over parts of the keys, their merging, and positives.

Logits are kept in base 2 and summed under a running maximum.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hsv_kernels.ops.contrast.rectangle import Form, Saved
from hsv_kernels.ops.contrast.triton_rectangle_tiles import (
    excluded,
    is_candidate,
    load_keys,
    rectangle_tiles,
    selection,
    similarity_to_keys,
    split,
    whole_chunks,
)
from hsv_kernels.ops.contrast.triton_table import Tiles
from hsv_kernels.ops.contrast.triton_tiles import LN2, LOG2E, padded, rows_of_tile
from hsv_kernels.ops.triton_utils import architecture_of, dot, dot_precision, round_to

__all__ = ["BLOCK_ROWS", "logsumexp_forward", "merge_splits_kernel", "positive_kernel", "rectangle_kernel"]

#: Rows of a block of merge_splits_kernel and positive_kernel.
BLOCK_ROWS = 16
#: Exponentials of base 2 reach 2^14 in float16 and 1 elsewhere, so that small ones stay normal numbers.
HEADROOM = tl.constexpr(14)


@triton.jit
def headroom(p_q):
    """What running maxima are lowered by: how far exponentials may rise in the dtype of p_q."""
    return HEADROOM if p_q.dtype.element_ty == tl.float16 else 0


@triton.jit
def add_tile(
    b_top, b_sum, b_mean, p_q, p_k, p_positive, p_q_labels, p_k_labels, b_scale, i_m, o_m, i_n, o_d,
    KEYS, SELF_OFFSET, stride, MASKED: tl.constexpr, EXCLUDE_SELF: tl.constexpr, POSITIVE: tl.constexpr,
    LABELS: tl.constexpr, MEAN: tl.constexpr, BY_COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The running maximum, sum and Σ_j 2^(s_ij − top_i) k_j with the tile of keys that begins at i_n."""
    o_n = rows_of_tile(i_n, KEYS, BLOCK_N) if MASKED and not BY_COLUMNS else tl.arange(0, BLOCK_N)
    b_s = b_scale * similarity_to_keys(
        p_q, i_m, o_m, p_k, i_n, o_n, stride, BY_COLUMNS, PRECISION, WIDTH, BLOCK_M, BLOCK_N, BLOCK_D
    )
    if MASKED:
        m_mn = is_candidate(
            p_positive, p_q_labels, p_k_labels, (tl.arange(0, BLOCK_N) < KEYS - i_n)[None, :],
            (i_m + o_m).to(tl.int32)[:, None], (i_n + o_n).to(tl.int32)[None, :],
            SELF_OFFSET, EXCLUDE_SELF, POSITIVE, LABELS,
        )  # fmt: skip
        b_s = tl.where(m_mn, b_s, -float("inf"))
    b_higher = tl.maximum(b_top, tl.max(b_s, 1) - headroom(p_q))
    b_shift = tl.where(b_higher == -float("inf"), 0, b_higher)
    b_p = tl.exp2(b_s - b_shift[:, None])
    b_kept = tl.exp2(b_top - b_shift)
    b_sum = b_sum * b_kept + tl.sum(b_p, 1)
    if MEAN:
        b_k = load_keys(p_k, i_n, o_n, o_d, stride, BY_COLUMNS)
        b_mean = dot(round_to(b_p, p_k.dtype.element_ty), b_k, b_mean * b_kept[:, None], PRECISION)
    return b_higher, b_sum, b_mean


@triton.jit
def rectangle_kernel(
    p_q, p_k, p_scale, p_positive, p_q_labels, p_k_labels, p_top, p_sum, p_mean,
    QUERIES, KEYS, D, TILES, SELF_OFFSET, stride,
    EXCLUDE_SELF: tl.constexpr, POSITIVE: tl.constexpr, LABELS: tl.constexpr, MEAN: tl.constexpr,
    BY_COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """top_i, Σ_j 2^(s_ij − top_i) and, with MEAN, Σ_j 2^(s_ij − top_i) k_j over one split of the keys, TILES tiles.

    Tiles [first, last) hold columns that some query leaves out and are masked, as is the ragged one at the end.
    """
    i_m = tl.program_id(0).to(tl.int64) * BLOCK_M
    i_split = tl.program_id(1).to(tl.int64)
    o_m = rows_of_tile(i_m, QUERIES, BLOCK_M)
    o_d = (0 if WIDTH == BLOCK_D else tl.program_id(2) * BLOCK_D) + tl.arange(0, BLOCK_D)  # 0: one load serves both
    b_scale = tl.load(p_scale) * LOG2E

    begin = i_split * TILES
    end = tl.minimum(begin + TILES, tl.cdiv(KEYS, BLOCK_N))
    full = tl.minimum(end, KEYS // BLOCK_N)
    least = tl.full((), KEYS, tl.int64)
    most = tl.full((), -1, tl.int64)
    if EXCLUDE_SELF:
        least = i_m + SELF_OFFSET
        most = i_m + SELF_OFFSET + BLOCK_M - 1
    if POSITIVE:
        b_positive = tl.load(p_positive + i_m + o_m)
        least = tl.minimum(least, tl.min(b_positive, 0))
        most = tl.maximum(most, tl.max(b_positive, 0))
    first = begin if LABELS else tl.minimum(tl.maximum(least // BLOCK_N, begin), full)
    last = full if LABELS else tl.minimum(tl.maximum(most // BLOCK_N + 1, first), full)

    b_top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    b_sum = tl.zeros((BLOCK_M,), tl.float32)
    b_mean = tl.zeros((BLOCK_M, BLOCK_D if MEAN else 1), tl.float32)
    for i in range(begin, full - (last - first)):
        i_n = tl.where(i < first, i, i + last - first) * BLOCK_N
        b_top, b_sum, b_mean = add_tile(
            b_top, b_sum, b_mean, p_q, p_k, p_positive, p_q_labels, p_k_labels, b_scale, i_m, o_m, i_n, o_d,
            KEYS, SELF_OFFSET, stride, False, EXCLUDE_SELF, POSITIVE, LABELS, MEAN, BY_COLUMNS, PRECISION,
            WIDTH, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    for i in range(first, last + end - full):
        i_n = tl.where(i < last, i, i + full - last) * BLOCK_N
        b_top, b_sum, b_mean = add_tile(
            b_top, b_sum, b_mean, p_q, p_k, p_positive, p_q_labels, p_k_labels, b_scale, i_m, o_m, i_n, o_d,
            KEYS, SELF_OFFSET, stride, True, EXCLUDE_SELF, POSITIVE, LABELS, MEAN, BY_COLUMNS, PRECISION,
            WIDTH, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip

    o_part = i_split * QUERIES + i_m + tl.arange(0, BLOCK_M)
    m_m = tl.arange(0, BLOCK_M) < QUERIES - i_m
    if tl.program_id(2) == 0:
        tl.store(p_top + o_part, b_top, mask=m_m)
        tl.store(p_sum + o_part, b_sum, mask=m_m)
    if MEAN:
        tl.store(p_mean + o_part[:, None] * D + o_d[None, :], b_mean, mask=m_m[:, None] & (o_d < D)[None, :])


@triton.jit
def merge_splits_kernel(
    p_top, p_sum, p_part, p_lse, p_log2_sum, p_mean, QUERIES, D, SPLITS,
    MEAN: tl.constexpr, KEEP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """lse, with MEAN the mean key, with KEEP top and log2 Σ_j 2^(s_ij − top_i), ∞ and 0 without candidates."""
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_m = o_m < QUERIES
    m_md = m_m[:, None] & (o_d < D)[None, :]

    b_top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    b_sum = tl.zeros((BLOCK_M,), tl.float32)
    b_mean = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    o_part = o_m
    for _ in range(SPLITS):
        b_part_top = tl.load(p_top + o_part, mask=m_m, other=0)
        b_higher = tl.maximum(b_top, b_part_top)
        b_shift = tl.where(b_higher == -float("inf"), 0, b_higher)
        b_kept, b_added = tl.exp2(b_top - b_shift), tl.exp2(b_part_top - b_shift)
        b_sum = b_sum * b_kept + tl.load(p_sum + o_part, mask=m_m, other=0) * b_added
        if MEAN:
            b_part = tl.load(p_part + o_part[:, None] * D + o_d[None, :], mask=m_md, other=0)
            b_mean = b_mean * b_kept[:, None] + b_part * b_added[:, None]
        b_top = b_higher
        o_part += QUERIES

    if tl.program_id(1) == 0:
        b_log2 = tl.log2(b_sum)
        tl.store(p_lse + o_m, (b_top + b_log2) * LN2, mask=m_m)
        if KEEP:
            tl.store(p_log2_sum + o_m, tl.where(b_sum == 0, float("inf"), b_top), mask=m_m)
            tl.store(p_log2_sum + QUERIES + o_m, tl.where(b_sum == 0, 0, b_log2), mask=m_m)
    if MEAN:
        b_mean = tl.where((b_sum == 0)[:, None], 0, b_mean / b_sum[:, None])
        tl.store(p_mean + o_m[:, None] * D + o_d[None, :], b_mean, mask=m_md)


def logsumexp_forward(
    q: Tensor, k: Tensor | None, scale: Tensor, form: Form, need_q: bool, need_k: bool
) -> tuple[Tensor, Tensor | None, Saved]:
    """lse [n] and None or, with positives, (d, positive_logit), and what backward needs of it; all float32.

    Args:
        q, k: of one dtype and any strides; k = None is q.
        scale: 0-dim float32 on the device, never read by the host.
        form: columns of positives are not checked.
        need_q: keep what the gradients of q and of the scale need, so that they never read k.
        need_k: keep what the gradient of k needs.
    """
    (n, dim), m = q.shape, len(q if k is None else k)
    dtype = torch.bfloat16 if form.bfloat16 else q.dtype
    tiles = rectangle_tiles(architecture_of(q), dtype, dim, need_q)
    width = whole_chunks(dim, tiles)
    queries = padded(q.to(dtype), width)
    keys, stride, by_columns = (queries, width, False) if k is None else laid_out(k.to(dtype), width, tiles)
    chunks = triton.cdiv(dim, tiles.dims) if need_q else 1
    per_split, splits = split(q, n, m, tiles, chunks)

    tops, sums = scale.new_empty(2, splits, n).unbind()
    parts = scale.new_empty(splits, n, dim) if need_q else None
    lse = scale.new_empty(n)
    mean_key = scale.new_empty(n, dim) if need_q else None
    log2_sum = scale.new_empty(2, n) if need_k else None
    block_dims = min(64, max(16, triton.next_power_of_2(dim)))
    with torch.cuda.device_of(q):
        rectangle_kernel[(triton.cdiv(n, tiles.rows), splits, chunks)](
            *(queries, keys, scale, *selection(form), tops, sums, parts, n, m, dim, per_split),
            *(max(-n, min(form.self_offset, m)), stride),
            **excluded(form),
            MEAN=need_q,
            BY_COLUMNS=by_columns,
            PRECISION=dot_precision(q),
            **tiles.options(width),
        )
        merge_splits_kernel[(triton.cdiv(n, BLOCK_ROWS), triton.cdiv(dim, block_dims) if need_q else 1)](
            *(tops, sums, parts, lse, log2_sum, mean_key, n, dim, splits),
            MEAN=need_q,
            KEEP=need_k,
            BLOCK_M=BLOCK_ROWS,
            BLOCK_D=block_dims if need_q else 1,
        )
    if form.positive is None:
        return lse, None, Saved(mean_key, None, log2_sum)
    logit, gathered = take_positives(lse, q, q if k is None else k, scale, form, need_q)
    return lse, logit, Saved(mean_key, gathered, log2_sum)


def laid_out(k: Tensor, width: int, tiles: Tiles) -> tuple[Tensor, int, bool]:
    """Keys that tiles load in whole vectors, the stride between keys and False, or that between dimensions and True.

    Triton knows of a stride that it is a multiple of 16, or nothing. A tile's rows lie less than 2^31 values apart.

    Rows of unit stride are read where they are, and so are columns, a queue kept as [D, m], if they are whole tiles.
    float32 columns are copied: matrix units take float32 by rows alone.
    """
    if k.shape[1] == width and k.data_ptr() % 16 == 0:
        if k.stride(1) == 1 and k.stride(0) % 16 == 0 and k.stride(0) * tiles.columns < 2**31:
            return k, k.stride(0), False
        whole = k.stride(0) == 1 and k.stride(1) % 16 == 0 and len(k) % tiles.columns == 0
        if whole and k.dtype != torch.float32:
            return k, k.stride(1), True
    return padded(k, width), width, False


@triton.jit
def positive_kernel(
    p_q, p_rows, p_columns, p_scale, p_lse, p_logit, p_gathered, QUERIES, D,
    stride_qm, stride_qd, stride_rm, stride_rd,
    COLUMNS: tl.constexpr, GATHER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """logit_i = scale · q_i · row_i, taken off lse in place; with COLUMNS row_i is rows[columns_i], kept if GATHER."""
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < QUERIES
    o_row = tl.load(p_columns + o_m, mask=m_m, other=0) if COLUMNS else o_m

    b_logit = tl.zeros((BLOCK_M,), tl.float32)
    for i_d in range(0, D, BLOCK_D):
        o_d = (i_d + tl.arange(0, BLOCK_D)).to(tl.int64)
        m_md = m_m[:, None] & (o_d < D)[None, :]
        b_q = tl.load(p_q + o_m[:, None] * stride_qm + o_d[None, :] * stride_qd, mask=m_md, other=0)
        b_row = tl.load(p_rows + o_row[:, None] * stride_rm + o_d[None, :] * stride_rd, mask=m_md, other=0)
        b_logit += tl.sum(b_q.to(tl.float32) * b_row.to(tl.float32), 1)
        if GATHER:
            tl.store(p_gathered + o_m[:, None] * D + o_d[None, :], b_row, mask=m_md)
    b_logit *= tl.load(p_scale)
    tl.store(p_logit + o_m, b_logit, mask=m_m)
    tl.store(p_lse + o_m, tl.load(p_lse + o_m, mask=m_m, other=0) - b_logit, mask=m_m)


def take_positives(
    lse: Tensor, q: Tensor, k: Tensor, scale: Tensor, form: Form, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """The positives' logits [n], taken off `lse` in place, and their rows [n, D] if they are columns of k and kept."""
    n, dim = q.shape
    columns = form.columns
    rows = k if columns is not None else form.rows
    logit = torch.empty_like(lse)
    gathered = q.new_empty(n, dim) if keep and columns is not None else None
    with torch.cuda.device_of(q):
        positive_kernel[(triton.cdiv(n, BLOCK_ROWS),)](
            *(q, rows, None if columns is None else columns.contiguous(), scale, lse, logit, gathered, n, dim),
            *(*q.stride(), *rows.stride()),
            COLUMNS=columns is not None,
            GATHER=gathered is not None,
            BLOCK_M=BLOCK_ROWS,
            BLOCK_D=min(64, max(16, triton.next_power_of_2(dim))),
        )
    return logit, gathered

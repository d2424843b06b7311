"""A step of Sinkhorn–Knopp in Triton: log-sums of rows and then of columns, each in blocks that are merged after."""

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from hsv_kernels.ops.distillation.reference import views
from hsv_kernels.ops.distillation.triton_views import LOWEST, greatest, groups_of, stacked
from hsv_kernels.ops.triton_utils import Configuration, processors_of, triton_type

__all__ = ["column_logsums", "configurations"]

ROW_BLOCK = 2048
COLUMN_ROWS, COLUMN_BLOCK = 8, 512


@triton.jit
def row_kernel(
    p_logits, p_scale, p_logsums, p_parts, N, K, stride_t, stride_n, stride_k, BK: tl.constexpr
):  # fmt: skip
    """log Σ_k exp(x_ik − logsums_k) of one row over one block of classes."""
    blocks = tl.cdiv(K, BK)
    i = tl.program_id(0).to(tl.int64)
    i_r, i_k = i // blocks, i % blocks
    o_k = i_k * BK + tl.arange(0, BK)
    m_k = o_k < K

    o_x = i_r // N * stride_t + i_r % N * stride_n + o_k * stride_k
    b_x = tl.load(p_logits + o_x, mask=m_k, other=float("-inf")).to(tl.float32) * tl.load(p_scale)
    b_x -= tl.load(p_logsums + o_k, mask=m_k, other=0)
    most = greatest(b_x, 0)
    tl.store(p_parts + i, most + tl.log(tl.sum(tl.exp(b_x - most), 0)))


@triton.jit
def column_kernel(
    p_logits, p_scale, p_rows, p_parts, N, K, R, ROWS, stride_t, stride_n, stride_k,
    NORMALISED: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """log Σ_i exp(x_ik − rows_i) of each column of one block over ROWS of the R rows."""
    blocks = tl.cdiv(K, BK)
    i = tl.program_id(0).to(tl.int64)
    i_group = i // blocks
    o_k = i % blocks * BK + tl.arange(0, BK)
    last = tl.minimum(i_group * ROWS + ROWS, R)
    scale = tl.load(p_scale)

    b_most = tl.full((BK,), LOWEST, tl.float32)
    b_sum = tl.zeros((BK,), tl.float32)
    for first in range(i_group * ROWS, last, BR):
        o_r = first + tl.arange(0, BR)
        m = (o_r < last)[:, None] & (o_k < K)[None, :]
        o_x = (o_r // N * stride_t + o_r % N * stride_n)[:, None] + (o_k * stride_k)[None, :]
        b_x = tl.load(p_logits + o_x, mask=m, other=float("-inf")).to(tl.float32) * scale  # [BR, BK]
        if NORMALISED:
            b_x -= tl.load(p_rows + o_r, mask=o_r < last, other=0)[:, None]
        b_new = tl.maximum(b_most, greatest(b_x, 0))
        b_sum = b_sum * tl.exp(b_most - b_new) + tl.sum(tl.exp(b_x - b_new[None, :]), 0)
        b_most = b_new
    tl.store(p_parts + i_group * K + o_k, b_most + tl.log(b_sum), mask=o_k < K)


def column_logsums(teacher: list[Tensor], scale: Tensor, logsums: Tensor | None) -> Tensor:
    """log Σ_i exp(x_ik − u_i) [K] over all rows of x = teacher · scale; u is 0 or normalises rows of x − logsums."""
    logits = stacked(views(teacher))
    T, N, K = logits.shape
    R = T * N
    if R == 0:
        return scale.new_full((K,), -math.inf)
    blocks = triton.cdiv(K, COLUMN_BLOCK)
    size, groups = groups_of(R, blocks, processors_of(logits))
    parts, rows = scale.new_empty(groups, K), None
    with torch.cuda.device_of(logits):
        if logsums is not None:
            of_blocks = scale.new_empty(R, triton.cdiv(K, ROW_BLOCK))
            row_kernel[of_blocks.numel(),](
                *(logits, scale, logsums.contiguous(), of_blocks, N, K, *logits.stride()), BK=ROW_BLOCK
            )
            rows = of_blocks.logsumexp(1)
        column_kernel[blocks * groups,](
            *(logits, scale, rows, parts, N, K, R, size, *logits.stride()),
            **{"NORMALISED": rows is not None, "BR": COLUMN_ROWS, "BK": COLUMN_BLOCK},
        )
    return parts.logsumexp(0)


def configurations() -> Iterator[Configuration]:
    """Specialisations for ahead-of-time compilation: the first step and the later ones, in the usual types."""
    sizes = dict.fromkeys(("N", "K", "stride_t", "stride_n"), "i32")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        pointers = {"p_logits": f"*{triton_type(dtype)}", "p_scale": "*fp32", "p_parts": "*fp32"}
        given = {**pointers, **sizes}
        yield Configuration(row_kernel, {**given, "p_logsums": "*fp32"}, {"stride_k": 1, "BK": ROW_BLOCK}, 4, 3)
        constants = {"stride_k": 1, "BR": COLUMN_ROWS, "BK": COLUMN_BLOCK}
        given |= {"R": "i32", "ROWS": "i32"}
        yield Configuration(column_kernel, {**given, "p_rows": "*fp32"}, {**constants, "NORMALISED": True}, 4, 3)
        yield Configuration(column_kernel, given, {**constants, "p_rows": None, "NORMALISED": False}, 4, 3)

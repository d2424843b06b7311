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
def add_exponentials(b_most, b_sum, b_x, AXIS: tl.constexpr):
    """The greatest m of what was seen and of `b_x` along the axis, and Σ exp(x − m)."""
    b_new = tl.maximum(b_most, greatest(b_x, AXIS))
    b_sum = b_sum * tl.exp(b_most - b_new) + tl.sum(tl.exp(b_x - tl.expand_dims(b_new, AXIS)), AXIS)
    return b_new, b_sum


@triton.jit
def column_kernel(
    p_logits, p_scale, p_rows, p_parts, N, K, ROWS, stride_t, stride_n, stride_k,
    NORMALISED: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """log Σ_i exp(x_ik − rows_i) of each column of one block over ROWS of the N rows of one view."""
    blocks, groups = tl.cdiv(K, BK), tl.cdiv(N, ROWS)
    i = tl.program_id(0).to(tl.int64)
    i_part = i // blocks
    i_t, i_group = i_part // groups, i_part % groups
    o_k = i % blocks * BK + tl.arange(0, BK)
    last = tl.minimum(i_group * ROWS + ROWS, N)
    scale = tl.load(p_scale)

    b_most = tl.full((BK,), LOWEST, tl.float32)
    b_sum = tl.zeros((BK,), tl.float32)
    for i_n in range(i_group * ROWS, last, BR):
        o_n = i_n + tl.arange(0, BR)
        m = (o_n < last)[:, None] & (o_k < K)[None, :]
        o_x = i_t * stride_t + (o_n * stride_n)[:, None] + (o_k * stride_k)[None, :]
        b_x = tl.load(p_logits + o_x, mask=m, other=float("-inf")).to(tl.float32) * scale  # [BR, BK]
        if NORMALISED:
            b_x -= tl.load(p_rows + i_t * N + o_n, mask=o_n < last, other=0)[:, None]
        b_most, b_sum = add_exponentials(b_most, b_sum, b_x, 0)
    tl.store(p_parts + i_part * K + o_k, b_most + tl.log(b_sum), mask=o_k < K)


@triton.jit
def sum_parts_kernel(p_x, p_out, N, P, stride_n, stride_p, BN: tl.constexpr, BP: tl.constexpr):
    """log Σ_p exp(x_np) of BN of the N rows of x, of P parts each."""
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    b_most = tl.full((BN,), LOWEST, tl.float32)
    b_sum = tl.zeros((BN,), tl.float32)
    for i_p in range(0, P, BP):
        o_p = i_p + tl.arange(0, BP).to(tl.int64)
        m = (o_n < N)[:, None] & (o_p < P)[None, :]
        b_x = tl.load(p_x + (o_n * stride_n)[:, None] + (o_p * stride_p)[None, :], mask=m, other=float("-inf"))
        b_most, b_sum = add_exponentials(b_most, b_sum, b_x, 1)
    tl.store(p_out + o_n, b_most + tl.log(b_sum), mask=o_n < N)


def column_logsums(teacher: list[Tensor], scale: Tensor, logsums: Tensor | None) -> Tensor:
    """log Σ_i exp(x_ik − u_i) [K] over all rows of x = teacher · scale; u is 0 or normalises rows of x − logsums."""
    logits = stacked(views(teacher))
    T, N, K = logits.shape
    if N == 0:
        return scale.new_full((K,), -math.inf)
    BK = block_of(K, COLUMN_BLOCK)
    blocks = triton.cdiv(K, BK)
    size, groups = groups_of(N, blocks * T, processors_of(logits))
    parts, rows = scale.new_empty(T * groups, K), None
    with torch.cuda.device_of(logits):
        if logsums is not None:
            row_block = block_of(K, ROW_BLOCK)
            of_blocks = scale.new_empty(T * N, triton.cdiv(K, row_block))
            row_kernel[of_blocks.numel(),](
                *(logits, scale, logsums.contiguous(), of_blocks, N, K, *logits.stride()), BK=row_block
            )
            rows = logsumexp(of_blocks)
        column_kernel[blocks * T * groups,](
            *(logits, scale, rows, parts, N, K, size, *logits.stride()),
            **{"NORMALISED": rows is not None, "BR": COLUMN_ROWS, "BK": BK},
        )
        return logsumexp(parts.T)


def logsumexp(x: Tensor) -> Tensor:
    """log Σ_p exp(x_np) [N] of x [N, P] in one launch, where torch's own takes one for each of its steps."""
    (N, P), found = x.shape, x.new_empty(len(x))
    tile = merge_tile(P)
    sum_parts_kernel[triton.cdiv(N, tile["BN"]),](x, found, N, P, *x.stride(), **tile)
    return found


def merge_tile(P: int) -> dict[str, int]:
    """1,024 numbers of P parts each."""
    BP = min(triton.next_power_of_2(P), 32)
    return {"BN": 1024 // BP, "BP": BP}


def block_of(K: int, most: int) -> int:
    """Classes of a program: K rounded up to a power of two, between 128 and `most`."""
    return max(128, min(triton.next_power_of_2(K), most))


def configurations() -> Iterator[Configuration]:
    """Specialisations for ahead-of-time compilation: the first step and the later ones, in the usual types."""
    sizes = dict.fromkeys(("N", "K", "stride_t", "stride_n"), "i32")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        pointers = {"p_logits": f"*{triton_type(dtype)}", "p_scale": "*fp32", "p_parts": "*fp32"}
        given = {**pointers, **sizes}
        yield Configuration(row_kernel, {**given, "p_logsums": "*fp32"}, {"stride_k": 1, "BK": ROW_BLOCK}, 4, 3)
        constants = {"stride_k": 1, "BR": COLUMN_ROWS, "BK": COLUMN_BLOCK}
        given["ROWS"] = "i32"
        yield Configuration(column_kernel, {**given, "p_rows": "*fp32"}, {**constants, "NORMALISED": True}, 4, 3)
        yield Configuration(column_kernel, given, {**constants, "p_rows": None, "NORMALISED": False}, 4, 3)
    merged = {"p_x": "*fp32", "p_out": "*fp32", "N": "i32", "P": "i32"}
    for P, near, far in ((32, "stride_p", "stride_n"), (8, "stride_n", "stride_p")):  # blocks of a row, of a column
        yield Configuration(sum_parts_kernel, {**merged, far: "i32"}, {near: 1, **merge_tile(P)}, 4, 3)

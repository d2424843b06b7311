"""The contrast operations in Triton: plain tensors in and out, no autograd.

Logits are kept in base 2. Rows are visited in plain order, each program writes its own rows, and what several programs
hold of one row is added in a fixed order: results do not change from run to run. docs/kernels/contrast.md derives the
formulas.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hsv_kernels.backends import interpreting
from hsv_kernels.ops.contrast.triton_normalise import (
    normalise,
    normalise_backward,
    normalise_backward_kernel,
    normalise_kernel,
)
from hsv_kernels.ops.contrast.triton_tiles import (
    LN2,
    LOG2E,
    Tiles,
    architecture_of,
    backward_tiles,
    forward_tiles,
    load_rows,
    log1p_exp,
    padded,
    rows_of_tile,
    similarity,
)
from hsv_kernels.ops.triton_utils import Configuration, dot, dot_precision, round_to, triton_type

__all__ = [
    "configurations",
    "nt_xent_backward",
    "nt_xent_forward",
    "square_logsumexp_backward",
    "square_logsumexp_forward",
]


@triton.jit
def candidates(
    i_m, i_n, M, PAIRS: tl.constexpr, EXCLUDE_SELF: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Which columns row m sums over: those there are, less itself and, with PAIRS, less its other view."""
    o_m = (i_m + tl.arange(0, BLOCK_M)).to(tl.int32)
    o_n = (i_n + tl.arange(0, BLOCK_N)).to(tl.int32)
    m_n = (o_n < M)[None, :]
    if EXCLUDE_SELF:
        m_n &= o_m[:, None] != o_n[None, :]
    if PAIRS:
        o_other = tl.where(o_m < M // 2, o_m + M // 2, o_m - M // 2)
        m_n &= o_other[:, None] != o_n[None, :]
    return m_n


@triton.jit
def logsumexp_kernel(
    p_z, p_scale, p_top, p_sum, M, COLUMNS,
    PAIRS: tl.constexpr, EXCLUDE_SELF: tl.constexpr, ONLINE: tl.constexpr, PRECISION: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Σ_j 2^(s_ij − top_i) over one split of COLUMNS columns, at [split, row]; top = 0 unless ONLINE."""
    i_m = tl.program_id(0).to(tl.int64) * BLOCK_M
    i_split = tl.program_id(1).to(tl.int64)
    o_m = rows_of_tile(i_m, M, BLOCK_M)
    b_scale = tl.load(p_scale) * LOG2E

    b_top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    b_sum = tl.zeros((BLOCK_M,), tl.float32)
    for i_n in range(i_split * COLUMNS, tl.minimum((i_split + 1) * COLUMNS, M), BLOCK_N):
        o_n = rows_of_tile(i_n, M, BLOCK_N)
        b_s = b_scale * similarity(p_z, i_m, o_m, i_n, o_n, PRECISION, WIDTH, BLOCK_M, BLOCK_N, BLOCK_D)
        b_s = tl.where(candidates(i_m, i_n, M, PAIRS, EXCLUDE_SELF, BLOCK_M, BLOCK_N), b_s, -float("inf"))
        if ONLINE:
            b_higher = tl.maximum(b_top, tl.max(b_s, 1))
            b_shift = tl.where(b_higher == -float("inf"), 0, b_higher)
            b_sum = b_sum * tl.exp2(b_top - b_shift) + tl.sum(tl.exp2(b_s - b_shift[:, None]), 1)
            b_top = b_higher
        else:
            b_sum += tl.sum(tl.exp2(b_s), 1)

    o_m = i_m + tl.arange(0, BLOCK_M)
    tl.store(p_sum + i_split * M + o_m, b_sum, mask=o_m < M)
    if ONLINE:
        tl.store(p_top + i_split * M + o_m, b_top, mask=o_m < M)


@triton.jit
def merge_kernel(
    p_top, p_sum, p_cosine, p_scale, p_lse, p_d, p_losses, M, SPLITS,
    PAIRS: tl.constexpr, ONLINE: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """lse from the splits' sums; with PAIRS d = lse − S_pos and losses = softplus(d)."""
    i_m = tl.program_id(0).to(tl.int64)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < M

    b_top = tl.full((BLOCK_M,), -float("inf") if ONLINE else 0.0, tl.float32)
    b_sum = tl.zeros((BLOCK_M,), tl.float32)
    o_split = o_m
    for _ in range(SPLITS):
        b_part = tl.load(p_sum + o_split, mask=m_m, other=0)
        if ONLINE:
            b_part_top = tl.load(p_top + o_split, mask=m_m, other=0)
            b_higher = tl.maximum(b_top, b_part_top)
            b_shift = tl.where(b_higher == -float("inf"), 0, b_higher)
            b_sum = b_sum * tl.exp2(b_top - b_shift) + b_part * tl.exp2(b_part_top - b_shift)
            b_top = b_higher
        else:
            b_sum += b_part
        o_split += M
    b_lse = (b_top + tl.log2(b_sum)) * LN2
    tl.store(p_lse + o_m, b_lse, mask=m_m)

    if PAIRS:
        b_cosine = tl.load(p_cosine + o_m % (M // 2), mask=m_m, other=0)
        b_d = b_lse - b_cosine * tl.load(p_scale)
        tl.store(p_d + o_m, b_d, mask=m_m)
        tl.store(p_losses + o_m, log1p_exp(b_d), mask=m_m)


def logsumexp(
    z: Tensor, dim: int, tiles: Tiles, scale: Tensor, cosine: Tensor | None, exclude_self: bool, fixed_shift: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """lse [M] of scale · z zᵀ; with the cosine of each pair, d and losses [M] too, the positives left out of lse.

    z is [M, tiles.width(dim)], zero from column dim on.
    """
    m = z.shape[0]
    pairs = cosine is not None
    columns, splits = split_columns(z, dim, tiles)
    sums = scale.new_empty(splits, m)
    tops = sums if fixed_shift else torch.empty_like(sums)
    lse = scale.new_empty(m)
    d, losses = (torch.empty_like(lse), torch.empty_like(lse)) if pairs else (None, None)
    with torch.cuda.device_of(z):
        logsumexp_kernel[(triton.cdiv(m, tiles.rows), splits)](
            *(z, scale, tops, sums, m, columns),
            PAIRS=pairs,
            EXCLUDE_SELF=exclude_self,
            ONLINE=not fixed_shift,
            PRECISION=dot_precision(),
            **tiles.options(dim),
        )
        merge_kernel[(triton.cdiv(m, 128),)](
            *(tops, sums, cosine, scale, lse, d, losses, m, splits),
            PAIRS=pairs,
            ONLINE=not fixed_shift,
            BLOCK_M=128,
        )
    return lse, d, losses


@triton.jit
def weight_kernel(
    p_grad, p_unit, p_lse, p_d, p_shift, p_weight, M, stride_grad,
    PAIRS: tl.constexpr, ONLINE: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """shift_i and weight_i of gradient_kernel: the base-2 logsumexp with the positive in it, and grad_i / unit.

    A fixed shift is folded into the weight.
    """
    i_m = tl.program_id(0).to(tl.int64)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < M
    b_lse = tl.load(p_lse + o_m, mask=m_m, other=0)
    b_weight = tl.load(p_grad + o_m * stride_grad, mask=m_m, other=0) / tl.load(p_unit)

    b_shift = b_lse * LOG2E
    if PAIRS:
        b_shift += log1p_exp(-tl.load(p_d + o_m, mask=m_m, other=0)) * LOG2E
    b_shift = tl.where(b_lse == -float("inf"), float("inf"), b_shift)
    if ONLINE:
        tl.store(p_shift + o_m, b_shift, mask=m_m)
    else:
        b_weight *= tl.exp2(-b_shift)
    tl.store(p_weight + o_m, b_weight, mask=m_m)


@triton.jit
def gradient_kernel(
    p_z, p_scale, p_shift, p_weight, p_gradient, M, D,
    PAIRS: tl.constexpr, EXCLUDE_SELF: tl.constexpr, ONLINE: tl.constexpr, PRECISION: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Σ_j W_ij z_j over one chunk of D, with W_ij = weight_i 2^(s_ij − shift_i) + weight_j 2^(s_ij − shift_j)."""
    i_m = tl.program_id(0).to(tl.int64) * BLOCK_M
    o_m = rows_of_tile(i_m, M, BLOCK_M)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    b_scale = tl.load(p_scale) * LOG2E
    b_weight_m = tl.load(p_weight + i_m + o_m)
    if ONLINE:
        b_shift_m = tl.load(p_shift + i_m + o_m)

    b_gradient = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for i_n in range(0, M, BLOCK_N):
        o_n = rows_of_tile(i_n, M, BLOCK_N)
        b_s = b_scale * similarity(p_z, i_m, o_m, i_n, o_n, PRECISION, WIDTH, BLOCK_M, BLOCK_N, BLOCK_D)
        b_weight_n = tl.load(p_weight + i_n + o_n)
        if ONLINE:
            b_shift_n = tl.load(p_shift + i_n + o_n)
            b_w = b_weight_m[:, None] * tl.exp2(b_s - b_shift_m[:, None])
            b_w += b_weight_n[None, :] * tl.exp2(b_s - b_shift_n[None, :])
        else:
            b_w = tl.exp2(b_s) * (b_weight_m[:, None] + b_weight_n[None, :])
        b_w = tl.where(candidates(i_m, i_n, M, PAIRS, EXCLUDE_SELF, BLOCK_M, BLOCK_N), b_w, 0)
        b_z = load_rows(p_z, i_n, o_n, o_d, WIDTH)
        b_gradient = dot(round_to(b_w, p_z.dtype.element_ty), b_z, b_gradient, PRECISION)

    o_m = i_m + tl.arange(0, BLOCK_M)
    m_md = (o_m < M)[:, None] & (o_d < D)[None, :]
    tl.store(p_gradient + o_m[:, None] * D + o_d[None, :], b_gradient, mask=m_md)


def weighted_rows(
    grad: Tensor,
    z: Tensor,
    dim: int,
    tiles: Tiles,
    scale: Tensor,
    lse: Tensor,
    d: Tensor | None,
    exclude_self: bool,
    fixed_shift: bool,
) -> tuple[Tensor, Tensor]:
    """Σ_j W_ij z_j [M, dim] in float32, in units of a 0-dim tensor that keeps W in the range of the dtype of z.

    z is [M, tiles.width(dim)], zero from column dim on.
    """
    m = z.shape[0]
    pairs = d is not None
    unit = gradient_unit(grad, z.dtype)
    weight = torch.empty_like(lse)
    shift = weight if fixed_shift else torch.empty_like(lse)
    rows = scale.new_empty(m, dim)
    with torch.cuda.device_of(z):
        weight_kernel[(triton.cdiv(m, 128),)](
            *(grad, unit, lse, d, shift, weight, m, grad.stride(0)), PAIRS=pairs, ONLINE=not fixed_shift, BLOCK_M=128
        )
        gradient_kernel[(triton.cdiv(m, tiles.rows), triton.cdiv(dim, tiles.dims))](
            *(z, scale, shift, weight, rows, m, dim),
            PAIRS=pairs,
            EXCLUDE_SELF=exclude_self,
            ONLINE=not fixed_shift,
            PRECISION=dot_precision(),
            **tiles.options(dim),
        )
    return rows, unit


def gradient_unit(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """What incoming gradients are divided by (0-dim float32): 1, or for float16 what makes the largest of them 2^13.

    W, at most twice that, then stays below float16's 65,504, and a weight of 2^-27 above its smallest normal number.
    """
    if dtype != torch.float16:
        return grad.new_ones(())
    top = grad.abs().amax()
    return torch.where(top == 0, 1.0, top * 2.0**-13)


def nt_xent_forward(
    z0: Tensor, z1: Tensor, temperature: Tensor, fixed_shift: bool | None, bfloat16: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The per-anchor losses of NT-Xent and what backward needs of them.

    Args:
        z0, z1: [N, D] of one dtype and any strides, not normalised.
        temperature: 0-dim float32; a value that is not positive and finite gives NaN.
        fixed_shift: sum exponentials as they are; needs 1 / temperature + log 2N < 64.
        bfloat16: products of rows rounded to bfloat16, whatever their dtype.
        keep: exponentials are never kept here, whatever it says.

    Returns:
        losses, lse over the negatives, d = lse − S_pos and inv_norm = 1 / max(‖x‖, 1e-12), each [2N] float32, and an
        empty tensor.
    """
    dim, dtype = z0.shape[1], torch.bfloat16 if bfloat16 else z0.dtype
    tiles = forward_tiles(architecture_of(z0), dtype, dim)
    z, inv_norm, cosine, scale = normalise(z0, z1, temperature, tiles.width(dim), dtype)
    lse, d, losses = logsumexp(z, dim, tiles, scale, cosine, True, bool(fixed_shift))
    return losses, lse, d, inv_norm, losses.new_empty(0)


def nt_xent_backward(
    grad: Tensor,
    z0: Tensor,
    z1: Tensor,
    temperature: Tensor,
    lse: Tensor,
    d: Tensor,
    inv_norm: Tensor,
    exponentials: Tensor,
    need_z: bool,
    need_temperature: bool,
    fixed_shift: bool | None,
    bfloat16: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of Σ grad_i · loss_i: dz0 and dz1 (None unless need_z), dtemperature (None unless need_temperature)."""
    dim, dtype = z0.shape[1], torch.bfloat16 if bfloat16 else z0.dtype
    tiles = backward_tiles(architecture_of(z0), dtype, dim)
    z, _, _, scale = normalise(z0, z1, temperature, tiles.width(dim), dtype)
    rows, unit = weighted_rows(grad, z, dim, tiles, scale, lse, d, True, bool(fixed_shift))
    dz0, dz1, radial = normalise_backward(grad, unit, scale, d, inv_norm, rows, z0, z1, need_z)
    return dz0, dz1, -0.5 * scale * radial.sum() if need_temperature else None


def square_logsumexp_forward(q: Tensor, scale: Tensor, exclude_self: bool, *, bfloat16: bool) -> tuple[Tensor, Tensor]:
    """lse_i = log Σ_j exp(scale · q_i · q_j) [n], column i left out of row i with exclude_self.

    A row without candidates gives −inf. The second result is empty. `bfloat16`: products of rows rounded to bfloat16,
    whatever their dtype.
    """
    dim, dtype = q.shape[1], torch.bfloat16 if bfloat16 else q.dtype
    tiles = forward_tiles(architecture_of(q), dtype, dim)
    lse = logsumexp(padded(q.to(dtype), tiles.width(dim)), dim, tiles, scale, None, exclude_self, False)[0]
    return lse, lse.new_empty(0)


def square_logsumexp_backward(
    grad: Tensor,
    q: Tensor,
    scale: Tensor,
    lse: Tensor,
    exclude_self: bool,
    need_q: bool,
    need_scale: bool,
    *,
    bfloat16: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of Σ grad_i · lse_i: dq, the sum of both roles of q (None unless need_q), and dscale likewise."""
    dim, dtype = q.shape[1], torch.bfloat16 if bfloat16 else q.dtype
    tiles = backward_tiles(architecture_of(q), dtype, dim)
    z = padded(q.to(dtype), tiles.width(dim))
    rows, unit = weighted_rows(grad, z, dim, tiles, scale, lse, None, exclude_self, False)
    dscale = 0.5 * unit * (q * rows).sum() if need_scale else None  # not vecdot: autocast and TF32 would round it
    return rows.mul_(scale * unit).to(q.dtype) if need_q else None, dscale


def split_columns(z: Tensor, dim: int, tiles: Tiles) -> tuple[int, int]:
    """Columns of a split and number of splits: enough programs for the device, at most D / 8 partial sums of a row."""
    m = z.shape[0]
    processors = 8 if interpreting() else torch.cuda.get_device_properties(z.device).multi_processor_count
    blocks = triton.cdiv(m, tiles.columns)
    wanted = triton.cdiv(2 * processors, triton.cdiv(m, tiles.rows))
    columns = triton.cdiv(blocks, max(1, min(wanted, dim // 8, blocks))) * tiles.columns
    return columns, triton.cdiv(m, columns)


def configurations() -> Iterator[Configuration]:
    """What the launchers choose, for ahead-of-time compilation; other architectures take the row of 0."""
    common = {"p_scale": "*fp32", "M": "i32", "D": "i32"}
    forward = {**common, "p_top": "*fp32", "p_sum": "*fp32", "COLUMNS": "i32"}
    backward = {**common, "p_shift": "*fp32", "p_weight": "*fp32", "p_gradient": "*fp32"}
    pairs, square = {"PAIRS": True, "EXCLUDE_SELF": True}, {"PAIRS": False, "EXCLUDE_SELF": False}
    for architecture, row in ((80, 80), (90, 90), (100, 100), (80, 0)):
        for dtype, dim, form, online in (
            (torch.bfloat16, 64, pairs, True),
            (torch.bfloat16, 128, pairs, True),
            (torch.bfloat16, 128, pairs, False),
            (torch.bfloat16, 128, square, True),
            (torch.bfloat16, 256, pairs, True),
            (torch.float16, 128, pairs, True),
            (torch.float32, 128, pairs, True),
        ):
            if row == 0 and dtype != torch.bfloat16:
                continue  # as the row of 80, or as bfloat16
            for kernel, signature, tiles in (
                (logsumexp_kernel, forward, forward_tiles(row, dtype, dim)),
                (gradient_kernel, backward, backward_tiles(row, dtype, dim)),
            ):
                constexprs = {**form, "ONLINE": online, "PRECISION": "tf32x3", **tiles.options(dim)}
                yield _configuration(
                    kernel, {"p_z": f"*{triton_type(dtype)}", **signature}, constexprs, architecture, matrix=True
                )
        if row:
            yield from _rowwise_configurations(architecture)


def _rowwise_configurations(architecture: int) -> Iterator[Configuration]:
    views = dict.fromkeys(("p_x0", "p_x1", "p_z", "p_dx0", "p_dx1"), "*bf16")
    rows = ("p_temperature", "p_inv_norm", "p_cosine", "p_scale", "p_top", "p_sum", "p_lse", "p_d", "p_losses")
    rows += ("p_grad", "p_unit", "p_shift", "p_weight", "p_rows", "p_radial")
    sizes = ("N", "M", "D", "SPLITS", "stride_grad", "stride_n0", "stride_d0", "stride_n1", "stride_d1")
    signature = {**views, **dict.fromkeys(rows, "*fp32"), **dict.fromkeys(sizes, "i32")}
    blocks = {"WIDTH": 128, "BLOCK_M": 128, "BLOCK_N": 8, "BLOCK_D": 64}
    constexprs = {"PAIRS": True, "ONLINE": True, "NEED_Z": True, **blocks, "num_warps": 4, "num_stages": 3}
    for kernel in (normalise_kernel, merge_kernel, weight_kernel, normalise_backward_kernel):
        yield _configuration(kernel, signature, constexprs, architecture, matrix=False)


def _configuration(
    kernel: Any, signature: dict[str, str], constexprs: dict[str, Any], architecture: int, *, matrix: bool
) -> Configuration:
    """The part of `signature` and `constexprs` that `kernel` takes."""
    names = [parameter.name for parameter in kernel.params]
    return Configuration(
        kernel,
        {name: kind for name, kind in signature.items() if name in names},
        {name: value for name, value in constexprs.items() if name in names},
        constexprs["num_warps"],
        constexprs["num_stages"],
        (architecture,),
        matrix,
    )

"""Normalised pairs of views for NT-Xent in Triton, and the gradient through the normalisation.

z alternates between the views: row 2n + v is image n of view v, so that a row's positive is its neighbour. Views are
read where they lie, rows of unit stride.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hsv_kernels.ops.tensors import unit_stride
from hsv_kernels.ops.triton_utils import round_to

__all__ = [
    "Normalised",
    "normalise",
    "normalise_backward",
    "normalise_backward_kernel",
    "normalise_kernel",
    "row_block",
]

SMALLEST_NORM = tl.constexpr(1e-12)
#: Inverse norms from here on are those of rows below SMALLEST_NORM, whose gradient is not projected.
UNPROJECTED = tl.constexpr(0.9999e12)


class Normalised(NamedTuple):
    """What `normalise` gives."""

    z: Tensor  # [2N, width]
    inv_norm: Tensor  # [2N] 1 / max(‖x‖, 1e-12), in the order of z; float32 like the others
    cosine: Tensor  # [N] of each pair
    scale: Tensor  # 0-dim, 1 / temperature


@triton.jit
def inverse_norm(square):
    """1 / max(√square, 1e-12); NaN stays NaN."""
    b_norm = tl.sqrt_rn(square)
    return tl.div_rn(1.0, tl.where(b_norm < SMALLEST_NORM, SMALLEST_NORM, b_norm))


@triton.jit
def normalise_kernel(
    p_x0, p_x1, p_temperature, p_z, p_inv_norm, p_cosine, p_scale, N, D, stride_n0, stride_n1,
    WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """z with normalised rows, zero from D on, the inverse norms, each pair's cosine, and 1 / temperature."""
    i_n = tl.program_id(0).to(tl.int64)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    m_n = o_n < N
    m_nd = m_n[:, None] & (o_d < D)[None, :]

    b_x0 = tl.load(p_x0 + o_n[:, None] * stride_n0 + o_d[None, :], mask=m_nd, other=0).to(tl.float32)
    b_x1 = tl.load(p_x1 + o_n[:, None] * stride_n1 + o_d[None, :], mask=m_nd, other=0).to(tl.float32)
    b_inv0 = inverse_norm(tl.sum(b_x0 * b_x0, 1))
    b_inv1 = inverse_norm(tl.sum(b_x1 * b_x1, 1))
    b_z0 = b_x0 * b_inv0[:, None]
    b_z1 = b_x1 * b_inv1[:, None]

    p_row = p_z + 2 * o_n[:, None] * WIDTH + o_d[None, :]
    m_z = m_n[:, None] & (o_d < WIDTH)[None, :]
    tl.store(p_row, round_to(b_z0, p_z.dtype.element_ty), mask=m_z)
    tl.store(p_row + WIDTH, round_to(b_z1, p_z.dtype.element_ty), mask=m_z)
    tl.store(p_inv_norm + 2 * o_n, b_inv0, mask=m_n)
    tl.store(p_inv_norm + 2 * o_n + 1, b_inv1, mask=m_n)
    tl.store(p_cosine + o_n, tl.sum(b_z0 * b_z1, 1), mask=m_n)
    if i_n == 0:
        b_temperature = tl.load(p_temperature)
        m_valid = (b_temperature > 0) & (b_temperature < float("inf"))
        b_scale = tl.div_rn(1.0, b_temperature)  # the bits of backward's: both look whether a fixed shift fits
        tl.store(p_scale, tl.where(m_valid, b_scale, float("nan")))


def normalise(z0: Tensor, z1: Tensor, temperature: Tensor, width: int, dtype: torch.dtype) -> Normalised:
    """Rows of z0 and z1 [N, D], of any strides, in turn: z [2N, width] of `dtype`, zero from column D on."""
    n, dim = z0.shape
    z0, z1 = unit_stride(z0), unit_stride(z1)
    found = Normalised(
        z0.new_empty(2 * n, width, dtype=dtype),
        *(temperature.new_empty(shape) for shape in ((2 * n,), (n,), ())),
    )
    block = row_block(dim)
    with torch.cuda.device_of(z0):
        normalise_kernel[(triton.cdiv(n, block["BLOCK_N"]),)](
            *(z0, z1, temperature, *found, n, dim, z0.stride(0), z1.stride(0)), WIDTH=width, **block
        )
    return found


@triton.jit
def normalise_backward_kernel(
    p_rows, p_grad, p_unit, p_scale, p_d, p_inv_norm, p_x0, p_x1, p_dx0, p_dx1, p_radial, N, D, SPLITS,
    stride_grad, stride_n0, stride_n1, NEED_Z: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Adds the splits' Σ_j W_ij z_j and the positives, and goes through the normalisation; radial_i = z_i · dz_i."""
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    m_n, m_d = o_n < N, (o_d < D)[None, :]
    m_nd = m_n[:, None] & m_d
    b_dz0 = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    b_dz1 = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for i_split in range(SPLITS):
        p_row = p_rows + ((tl.cast(i_split, tl.int64) * N + o_n) * 2)[:, None] * D + o_d[None, :]
        b_dz0 += tl.load(p_row, mask=m_nd, other=0)
        b_dz1 += tl.load(p_row + D, mask=m_nd, other=0)

    b_scale, b_unit = tl.load(p_scale), tl.load(p_unit)
    b_inv0 = tl.load(p_inv_norm + 2 * o_n, mask=m_n, other=0)
    b_inv1 = tl.load(p_inv_norm + 2 * o_n + 1, mask=m_n, other=0)
    b_positive = tl.load(p_grad + o_n * stride_grad, mask=m_n, other=0) * tl.sigmoid(
        tl.load(p_d + 2 * o_n, mask=m_n, other=0)
    ) + tl.load(p_grad + (N + o_n) * stride_grad, mask=m_n, other=0) * tl.sigmoid(
        tl.load(p_d + 2 * o_n + 1, mask=m_n, other=0)
    )
    b_x0 = tl.load(p_x0 + o_n[:, None] * stride_n0 + o_d[None, :], mask=m_nd, other=0).to(tl.float32)
    b_x1 = tl.load(p_x1 + o_n[:, None] * stride_n1 + o_d[None, :], mask=m_nd, other=0).to(tl.float32)
    b_z0, b_z1 = b_x0 * b_inv0[:, None], b_x1 * b_inv1[:, None]
    b_dz0 = b_scale * (b_dz0 * b_unit - b_positive[:, None] * b_z1)
    b_dz1 = b_scale * (b_dz1 * b_unit - b_positive[:, None] * b_z0)
    b_radial0, b_radial1 = tl.sum(b_z0 * b_dz0, 1), tl.sum(b_z1 * b_dz1, 1)
    tl.store(p_radial + o_n, b_radial0, mask=m_n)
    tl.store(p_radial + N + o_n, b_radial1, mask=m_n)

    if NEED_Z:
        b_radial0 = tl.where(b_inv0 < UNPROJECTED, b_radial0, 0)
        b_radial1 = tl.where(b_inv1 < UNPROJECTED, b_radial1, 0)
        b_dx0 = (b_dz0 - b_z0 * b_radial0[:, None]) * b_inv0[:, None]
        b_dx1 = (b_dz1 - b_z1 * b_radial1[:, None]) * b_inv1[:, None]
        o_nd = o_n[:, None] * D + o_d[None, :]
        tl.store(p_dx0 + o_nd, round_to(b_dx0, p_dx0.dtype.element_ty), mask=m_nd)
        tl.store(p_dx1 + o_nd, round_to(b_dx1, p_dx1.dtype.element_ty), mask=m_nd)


def normalise_backward(
    grad: Tensor,
    unit: Tensor,
    scale: Tensor,
    d: Tensor,
    inv_norm: Tensor,
    rows: Tensor,
    z0: Tensor,
    z1: Tensor,
    need_z: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Gradients of the views, None unless need_z, and radial_i = z_i · dz_i [2N], from the negatives' part of dz.

    `rows` [splits, 2N, D] adds up to that part, Σ_j W_ij z_j in units of `unit`; d and inv_norm [2N] are, like the
    rows, in the order of z, grad [2N] in the order of the caller.
    """
    n, dim = z0.shape
    dz0, dz1 = (torch.empty(n, dim, dtype=z0.dtype, device=z0.device) if need_z else None for _ in range(2))
    radial = torch.empty_like(d)
    z0, z1 = unit_stride(z0), unit_stride(z1)
    block = row_block(dim)
    with torch.cuda.device_of(z0):
        normalise_backward_kernel[(triton.cdiv(n, block["BLOCK_N"]),)](
            *(rows, grad, unit, scale, d, inv_norm, z0, z1, dz0, dz1, radial, n, dim, len(rows)),
            *(grad.stride(0), z0.stride(0), z1.stride(0)),
            NEED_Z=need_z,
            **block,
        )
    return dz0, dz1, radial


def row_block(dim: int) -> dict[str, int]:
    """Whole rows for a program, about 2,048 values, and its warps."""
    wide = max(16, triton.next_power_of_2(dim))
    return {"BLOCK_N": max(1, 2048 // wide), "BLOCK_D": wide, "num_warps": min(16, max(4, wide // 512))}

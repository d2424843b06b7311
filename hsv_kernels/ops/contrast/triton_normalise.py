"""Normalised pairs of views for NT-Xent in Triton, and the gradient through the normalisation."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hsv_kernels.ops.triton_utils import round_to

__all__ = ["normalise", "normalise_backward", "normalise_backward_kernel", "normalise_kernel"]

#: Rows of a block; with more of them, or more dimensions than block_dims, general strides spill.
BLOCK_ROWS = 8
SMALLEST_NORM = tl.constexpr(1e-12)
#: Inverse norms from here on are those of rows below SMALLEST_NORM, whose gradient is not projected.
UNPROJECTED = tl.constexpr(0.9999e12)


@triton.jit
def inverse_norm(square):
    """1 / max(√square, 1e-12); NaN stays NaN."""
    b_norm = tl.sqrt_rn(square)
    return tl.div_rn(1.0, tl.where(b_norm < SMALLEST_NORM, SMALLEST_NORM, b_norm))


@triton.jit
def normalise_kernel(
    p_x0, p_x1, p_temperature, p_z, p_inv_norm, p_cosine, p_scale, N, D,
    stride_n0, stride_d0, stride_n1, stride_d1,
    WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """z = [x0; x1] with normalised rows, zero from D on, the inverse norms, each pair's cosine, 1 / temperature."""
    i_n = tl.program_id(0).to(tl.int64)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N

    b_square0 = tl.zeros((BLOCK_N,), tl.float32)
    b_square1 = tl.zeros((BLOCK_N,), tl.float32)
    for i_d in range(0, D, BLOCK_D):
        o_d = (i_d + tl.arange(0, BLOCK_D)).to(tl.int64)
        m_nd = m_n[:, None] & (o_d < D)[None, :]
        b_x0 = tl.load(p_x0 + o_n[:, None] * stride_n0 + o_d[None, :] * stride_d0, mask=m_nd, other=0).to(tl.float32)
        b_x1 = tl.load(p_x1 + o_n[:, None] * stride_n1 + o_d[None, :] * stride_d1, mask=m_nd, other=0).to(tl.float32)
        b_square0 += tl.sum(b_x0 * b_x0, 1)
        b_square1 += tl.sum(b_x1 * b_x1, 1)
    b_inv0 = inverse_norm(b_square0)
    b_inv1 = inverse_norm(b_square1)
    tl.store(p_inv_norm + o_n, b_inv0, mask=m_n)
    tl.store(p_inv_norm + N + o_n, b_inv1, mask=m_n)

    b_cosine = tl.zeros((BLOCK_N,), tl.float32)
    for i_d in range(0, WIDTH, BLOCK_D):
        o_d = (i_d + tl.arange(0, BLOCK_D)).to(tl.int64)
        m_nd = m_n[:, None] & (o_d < D)[None, :]
        b_x0 = tl.load(p_x0 + o_n[:, None] * stride_n0 + o_d[None, :] * stride_d0, mask=m_nd, other=0).to(tl.float32)
        b_x1 = tl.load(p_x1 + o_n[:, None] * stride_n1 + o_d[None, :] * stride_d1, mask=m_nd, other=0).to(tl.float32)
        b_z0 = b_x0 * b_inv0[:, None]
        b_z1 = b_x1 * b_inv1[:, None]
        b_cosine += tl.sum(b_z0 * b_z1, 1)
        o_z = o_n[:, None] * WIDTH + o_d[None, :]
        m_z = m_n[:, None] & (o_d < WIDTH)[None, :]
        tl.store(p_z + o_z, round_to(b_z0, p_z.dtype.element_ty), mask=m_z)
        tl.store(p_z + o_z + tl.cast(N, tl.int64) * WIDTH, round_to(b_z1, p_z.dtype.element_ty), mask=m_z)
    tl.store(p_cosine + o_n, b_cosine, mask=m_n)

    if i_n == 0:
        b_temperature = tl.load(p_temperature)
        m_valid = (b_temperature > 0) & (b_temperature < float("inf"))
        tl.store(p_scale, tl.where(m_valid, 1 / b_temperature, float("nan")))


def normalise(
    z0: Tensor, z1: Tensor, temperature: Tensor, width: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z [2N, width] of `dtype`, inv_norm [2N], cosine [N] of each pair, 1 / temperature (0-dim); float32."""
    n, dim = z0.shape
    z = z0.new_empty(2 * n, width, dtype=dtype)
    inv_norm, cosine, scale = (temperature.new_empty(shape) for shape in ((2 * n,), (n,), ()))
    with torch.cuda.device_of(z0):
        normalise_kernel[(triton.cdiv(n, BLOCK_ROWS),)](
            *(z0, z1, temperature, z, inv_norm, cosine, scale, n, dim, *z0.stride(), *z1.stride()),
            WIDTH=width,
            BLOCK_N=BLOCK_ROWS,
            BLOCK_D=block_dims(dim),
        )
    return z, inv_norm, cosine, scale


@triton.jit
def view_gradient(p_x0, p_x1, p_rows, o_n, o_d, m_nd, N, D, stride_n0, stride_d0, stride_n1, stride_d1,
                  b_inv0, b_inv1, b_unit, b_positive, b_scale):  # fmt: skip
    """z0, z1 and the gradients with respect to them, as float32 blocks [BLOCK_N, BLOCK_D]."""
    b_x0 = tl.load(p_x0 + o_n[:, None] * stride_n0 + o_d[None, :] * stride_d0, mask=m_nd, other=0).to(tl.float32)
    b_x1 = tl.load(p_x1 + o_n[:, None] * stride_n1 + o_d[None, :] * stride_d1, mask=m_nd, other=0).to(tl.float32)
    b_z0 = b_x0 * b_inv0[:, None]
    b_z1 = b_x1 * b_inv1[:, None]
    b_rows0 = tl.load(p_rows + o_n[:, None] * D + o_d[None, :], mask=m_nd, other=0)
    b_rows1 = tl.load(p_rows + (N + o_n)[:, None] * D + o_d[None, :], mask=m_nd, other=0)
    b_dz0 = b_scale * (b_rows0 * b_unit - b_positive[:, None] * b_z1)
    b_dz1 = b_scale * (b_rows1 * b_unit - b_positive[:, None] * b_z0)
    return b_z0, b_z1, b_dz0, b_dz1


@triton.jit
def normalise_backward_kernel(
    p_grad, p_unit, p_scale, p_d, p_inv_norm, p_rows, p_x0, p_x1, p_dx0, p_dx1, p_radial, N, D, stride_grad,
    stride_n0, stride_d0, stride_n1, stride_d1, NEED_Z: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Adds the positives to Σ_j W_ij z_j, and takes the gradient through the normalisation; radial_i = z_i · dz_i."""
    i_n = tl.program_id(0).to(tl.int64)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    b_scale = tl.load(p_scale)
    b_unit = tl.load(p_unit)
    b_inv0 = tl.load(p_inv_norm + o_n, mask=m_n, other=0)
    b_inv1 = tl.load(p_inv_norm + N + o_n, mask=m_n, other=0)
    b_positive = tl.load(p_grad + o_n * stride_grad, mask=m_n, other=0) * tl.sigmoid(
        tl.load(p_d + o_n, mask=m_n, other=0)
    ) + tl.load(p_grad + (N + o_n) * stride_grad, mask=m_n, other=0) * tl.sigmoid(
        tl.load(p_d + N + o_n, mask=m_n, other=0)
    )

    b_radial0 = tl.zeros((BLOCK_N,), tl.float32)
    b_radial1 = tl.zeros((BLOCK_N,), tl.float32)
    for i_d in range(0, D, BLOCK_D):
        o_d = (i_d + tl.arange(0, BLOCK_D)).to(tl.int64)
        m_nd = m_n[:, None] & (o_d < D)[None, :]
        b_z0, b_z1, b_dz0, b_dz1 = view_gradient(
            p_x0, p_x1, p_rows, o_n, o_d, m_nd, N, D, stride_n0, stride_d0, stride_n1, stride_d1,
            b_inv0, b_inv1, b_unit, b_positive, b_scale,
        )  # fmt: skip
        b_radial0 += tl.sum(b_z0 * b_dz0, 1)
        b_radial1 += tl.sum(b_z1 * b_dz1, 1)
    tl.store(p_radial + o_n, b_radial0, mask=m_n)
    tl.store(p_radial + N + o_n, b_radial1, mask=m_n)

    if NEED_Z:
        b_radial0 = tl.where(b_inv0 < UNPROJECTED, b_radial0, 0)
        b_radial1 = tl.where(b_inv1 < UNPROJECTED, b_radial1, 0)
        for i_d in range(0, D, BLOCK_D):
            o_d = (i_d + tl.arange(0, BLOCK_D)).to(tl.int64)
            m_nd = m_n[:, None] & (o_d < D)[None, :]
            b_z0, b_z1, b_dz0, b_dz1 = view_gradient(
                p_x0, p_x1, p_rows, o_n, o_d, m_nd, N, D, stride_n0, stride_d0, stride_n1, stride_d1,
                b_inv0, b_inv1, b_unit, b_positive, b_scale,
            )  # fmt: skip
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

    `rows` [2N, D] holds that part, Σ_j W_ij z_j, in units of `unit`.
    """
    n, dim = z0.shape
    dz0, dz1 = (torch.empty(n, dim, dtype=z0.dtype, device=z0.device) if need_z else None for _ in range(2))
    radial = torch.empty_like(d)
    with torch.cuda.device_of(z0):
        normalise_backward_kernel[(triton.cdiv(n, BLOCK_ROWS),)](
            *(grad, unit, scale, d, inv_norm, rows, z0, z1, dz0, dz1, radial, n, dim, grad.stride(0)),
            *(*z0.stride(), *z1.stride()),
            NEED_Z=need_z,
            BLOCK_N=BLOCK_ROWS,
            BLOCK_D=block_dims(dim),
        )
    return dz0, dz1, radial


def block_dims(dim: int) -> int:
    return min(64, max(16, triton.next_power_of_2(dim)))

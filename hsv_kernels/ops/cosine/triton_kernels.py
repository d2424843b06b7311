"""The negative cosine of rows in Triton: one kernel each way, a program works on a few whole rows."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hsv_kernels.ops.triton_utils import Configuration, round_to, triton_type

__all__ = ["backward", "configurations", "forward"]


@triton.jit
def load_rows(p_x, o_n, o_d, N, D, stride_n, stride_d):
    """Rows [R, BD] in float32, 0 beyond the last row and column."""
    m = (o_n < N)[:, None] & (o_d < D)[None, :]
    return tl.load(p_x + (o_n * stride_n)[:, None] + (o_d * stride_d)[None, :], mask=m, other=0).to(tl.float32)


@triton.jit
def forward_kernel(
    p_p, p_z, p_losses, p_inv_norm, N, D, eps, p_stride_n, p_stride_d, z_stride_n, z_stride_d,
    R: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """−cos of R rows, and 1 / max(‖row‖, eps) of both."""
    o_n = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    b_pz, b_pp, b_zz = tl.zeros((R,), tl.float32), tl.zeros((R,), tl.float32), tl.zeros((R,), tl.float32)
    for d in range(0, D, BD):
        o_d = d + tl.arange(0, BD).to(tl.int64)
        b_p = load_rows(p_p, o_n, o_d, N, D, p_stride_n, p_stride_d)  # [R, BD]
        b_z = load_rows(p_z, o_n, o_d, N, D, z_stride_n, z_stride_d)
        b_pz += tl.sum(b_p * b_z, 1)
        b_pp += tl.sum(b_p * b_p, 1)
        b_zz += tl.sum(b_z * b_z, 1)

    b_p_norm, b_z_norm = tl.sqrt_rn(b_pp), tl.sqrt_rn(b_zz)
    b_of_p = tl.div_rn(1.0, tl.where(b_p_norm < eps, eps, b_p_norm))  # NaN stays NaN
    b_of_z = tl.div_rn(1.0, tl.where(b_z_norm < eps, eps, b_z_norm))
    tl.store(p_losses + o_n, -b_pz * b_of_p * b_of_z, mask=o_n < N)
    tl.store(p_inv_norm + o_n, b_of_p, mask=o_n < N)
    tl.store(p_inv_norm + N + o_n, b_of_z, mask=o_n < N)


@triton.jit
def store_gradient(p_out, b_u, b_v, b_grad, b_loss, b_of_x, most, o_n, o_d, N, D):
    """−grad · of_x (v + loss · u) to a contiguous [N, D], of unit rows u of x and v; no u where ‖x‖ is eps."""
    b_along = tl.where(b_of_x < most, b_loss, 0)
    b_out = -(b_grad * b_of_x)[:, None] * (b_v + b_along[:, None] * b_u)
    m = (o_n < N)[:, None] & (o_d < D)[None, :]
    tl.store(p_out + (o_n * D)[:, None] + o_d[None, :], round_to(b_out, p_out.dtype.element_ty), mask=m)


@triton.jit
def backward_kernel(
    p_grad, p_p, p_z, p_losses, p_inv_norm, p_dp, p_dz, N, D, eps, p_stride_n, p_stride_d, z_stride_n, z_stride_d,
    NEED_P: tl.constexpr, NEED_Z: tl.constexpr, R: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Gradients of R rows of p and z over BD columns; a norm below eps is the constant eps."""
    blocks = tl.cdiv(D, BD)
    i = tl.program_id(0).to(tl.int64)
    o_n, o_d = i // blocks * R + tl.arange(0, R), i % blocks * BD + tl.arange(0, BD)
    m_n = o_n < N
    b_grad, b_loss = tl.load(p_grad + o_n, mask=m_n, other=0), tl.load(p_losses + o_n, mask=m_n, other=0)
    b_of_p = tl.load(p_inv_norm + o_n, mask=m_n, other=0)
    b_of_z = tl.load(p_inv_norm + N + o_n, mask=m_n, other=0)
    most = tl.div_rn(1.0, eps + tl.zeros((R,), tl.float32))

    b_u = b_of_p[:, None] * load_rows(p_p, o_n, o_d, N, D, p_stride_n, p_stride_d)  # [R, BD]
    b_v = b_of_z[:, None] * load_rows(p_z, o_n, o_d, N, D, z_stride_n, z_stride_d)
    if NEED_P:
        store_gradient(p_dp, b_u, b_v, b_grad, b_loss, b_of_p, most, o_n, o_d, N, D)
    if NEED_Z:
        store_gradient(p_dz, b_v, b_u, b_grad, b_loss, b_of_z, most, o_n, o_d, N, D)


class Tile(NamedTuple):
    """Rows and columns of a program's block: 2,048 values of each input, wide before high."""

    R: int
    BD: int


def tile_of(D: int) -> Tile:
    BD = min(triton.next_power_of_2(D), 1024)
    return Tile(min(2048 // BD, 16), BD)


def forward(p: Tensor, z: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """−cos(p_i, z_i) [N], and 1 / max(‖row‖, eps) of p and of z [2, N]; float32."""
    N, D = p.shape
    losses = p.new_empty(N, dtype=torch.float32)
    inv_norm, tile = losses.new_empty(2, N), tile_of(D)
    with torch.cuda.device_of(p):
        forward_kernel[triton.cdiv(N, tile.R),](
            *(p, z, losses, inv_norm, N, D, eps, *p.stride(), *z.stride()), **tile._asdict()
        )
    return losses, inv_norm


def backward(
    grad: Tensor, p: Tensor, z: Tensor, losses: Tensor, inv_norm: Tensor, eps: float, need_p: bool, need_z: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of p and z [N, D] in their types, for the gradient [N] of the losses; None where not needed."""
    (N, D), tile = p.shape, tile_of(p.shape[1])
    dp, dz = (x.new_empty(x.shape) if needed else None for x, needed in ((p, need_p), (z, need_z)))
    with torch.cuda.device_of(p):
        backward_kernel[triton.cdiv(N, tile.R) * triton.cdiv(D, tile.BD),](
            *(grad.contiguous(), p, z, losses.contiguous(), inv_norm.contiguous(), dp, dz),
            *(N, D, eps, *p.stride(), *z.stride()),
            **{"NEED_P": need_p, "NEED_Z": need_z, **tile._asdict()},
        )
    return dp, dz


def configurations() -> Iterator[Configuration]:
    """Specialisations for ahead-of-time compilation: rows of 256 and of 2,048, in the usual types."""
    rows = dict.fromkeys(("p_grad", "p_losses", "p_inv_norm"), "*fp32")
    sizes = {**dict.fromkeys(("N", "D", "p_stride_n", "z_stride_n"), "i32"), "eps": "fp32"}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        values = f"*{triton_type(dtype)}"
        for D in (256, 2048):
            given = {"p_p": values, "p_z": values, **rows, **sizes}
            constants = {"p_stride_d": 1, "z_stride_d": 1, **tile_of(D)._asdict()}
            yield Configuration(
                forward_kernel, {k: kind for k, kind in given.items() if k != "p_grad"}, constants, 4, 3
            )
            needed = {**constants, "NEED_P": True, "NEED_Z": True}
            yield Configuration(backward_kernel, {**given, "p_dp": values, "p_dz": values}, needed, 4, 3)
        one = {**constants, "NEED_P": True, "NEED_Z": False, "p_dz": None}
        yield Configuration(backward_kernel, {**given, "p_dp": values}, one, 4, 3)

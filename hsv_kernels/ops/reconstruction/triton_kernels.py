"""The masked mean squared error in Triton: a program works on a few patches of one image, read where they lie."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hsv_kernels.ops.reconstruction.reference import EPS
from hsv_kernels.ops.triton_utils import Configuration, round_to

__all__ = ["MAX_VALUES", "backward", "configurations", "forward"]

#: Largest p·q·C: a patch is held in the registers of one program.
MAX_VALUES = 16384


@triton.jit
def _patches_of_program(L, T: tl.constexpr):
    """Image, patches [T] within it and which of them exist."""
    blocks = tl.cdiv(L, T)
    i_b = (tl.program_id(0) // blocks).to(tl.int64)
    o_l = tl.program_id(0) % blocks * T + tl.arange(0, T)
    return i_b, o_l, o_l < L


@triton.jit
def _load_patches(
    p_image, o_l, m, columns, s_c, s_h, s_w, P: tl.constexpr, Q: tl.constexpr, C: tl.constexpr, N: tl.constexpr
):
    """Patches o_l of the image at p_image in (p, q, c) order, 0 outside of the mask m; [T, N], float32."""
    o_n = tl.arange(0, N)
    y = (o_l // columns * P)[:, None] + (o_n // (Q * C))[None, :]  # [T, N]
    x = (o_l % columns * Q)[:, None] + (o_n // C % Q)[None, :]
    c = (o_n % C)[None, :]
    o = y.to(tl.int64) * s_h + x.to(tl.int64) * s_w + c.to(tl.int64) * s_c
    return tl.load(p_image + o, mask=m, other=0).to(tl.float32)


@triton.jit
def forward_kernel(
    p_pred,
    p_images,
    p_mask,
    p_losses,
    p_mean,
    p_rstd,
    L,
    columns,
    s_pb,
    s_pl,
    s_pn,
    s_ib,
    s_ic,
    s_ih,
    s_iw,
    EPS: tl.constexpr,
    NORM: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
    N: tl.constexpr,
):
    n: tl.constexpr = P * Q * C
    i_b, o_l, m_l = _patches_of_program(L, T)
    o_t = i_b * L + o_l
    o_n = tl.arange(0, N).to(tl.int64)
    b_mask = tl.load(p_mask + o_t, mask=m_l, other=0)  # [T]
    m_t = b_mask != 0
    m = m_t[:, None] & (o_n < n)[None, :]

    b_x = _load_patches(p_images + i_b * s_ib, o_l, m, columns, s_ic, s_ih, s_iw, P, Q, C, N)  # [T, N]
    p_row = p_pred + i_b * s_pb + o_l.to(tl.int64) * s_pl
    b_pred = tl.load(p_row[:, None] + o_n[None, :] * s_pn, mask=m, other=0).to(tl.float32)

    b_mean = tl.zeros([T], tl.float32)
    b_rstd = tl.where(m_t, 1.0, 0.0)
    if NORM:
        b_mean = tl.sum(b_x, 1) / n
        b_centred = tl.where(m, b_x - b_mean[:, None], 0)
        b_rstd = tl.where(m_t, 1 / tl.sqrt(tl.sum(b_centred * b_centred, 1) / (n - 1) + EPS), 0)
    b_error = tl.where(m, b_pred - (b_x - b_mean[:, None]) * b_rstd[:, None], 0)
    b_loss = tl.where(m_t, b_mask * (tl.sum(b_error * b_error, 1) / n), 0)

    tl.store(p_losses + o_t, b_loss, mask=m_l)
    tl.store(p_mean + o_t, b_mean, mask=m_l)
    tl.store(p_rstd + o_t, b_rstd, mask=m_l)


def forward(
    pred: Tensor, images: Tensor, mask: Tensor, p: int, q: int, norm_pix: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, means and reciprocal deviations [B, L]; `mask` contiguous float32."""
    losses, mean, rstd = (torch.empty_like(mask) for _ in range(3))
    grid, shape, columns, block = _launch(pred, images, p, q)
    with torch.cuda.device_of(pred):
        forward_kernel[grid](
            *(pred, images, mask, losses, mean, rstd),
            *(pred.shape[1], columns, *pred.stride(), *images.stride()),
            **{"EPS": EPS, "NORM": norm_pix, **shape, **block.sizes},
            num_warps=block.num_warps,
        )
    return losses, mean, rstd


@triton.jit
def backward_kernel(
    p_pred,
    p_images,
    p_mask,
    p_weights,
    p_mean,
    p_rstd,
    p_gradient,
    L,
    columns,
    s_pb,
    s_pl,
    s_pn,
    s_ib,
    s_ic,
    s_ih,
    s_iw,
    P: tl.constexpr,
    Q: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
    N: tl.constexpr,
):
    n: tl.constexpr = P * Q * C
    i_b, o_l, m_l = _patches_of_program(L, T)
    o_t = i_b * L + o_l
    o_n = tl.arange(0, N).to(tl.int64)
    m_n = (o_n < n)[None, :]
    m_t = tl.load(p_mask + o_t, mask=m_l, other=0) != 0  # [T]
    m = m_t[:, None] & m_n

    b_x = _load_patches(p_images + i_b * s_ib, o_l, m, columns, s_ic, s_ih, s_iw, P, Q, C, N)  # [T, N]
    p_row = p_pred + i_b * s_pb + o_l.to(tl.int64) * s_pl
    b_pred = tl.load(p_row[:, None] + o_n[None, :] * s_pn, mask=m, other=0).to(tl.float32)
    b_weight = tl.load(p_weights + o_t, mask=m_t, other=0)
    b_mean = tl.load(p_mean + o_t, mask=m_t, other=0)
    b_rstd = tl.load(p_rstd + o_t, mask=m_t, other=0)

    b_gradient = (b_pred - (b_x - b_mean[:, None]) * b_rstd[:, None]) * b_weight[:, None]
    p_out = p_gradient + o_t[:, None] * n + o_n[None, :]
    tl.store(p_out, round_to(b_gradient, p_gradient.dtype.element_ty), mask=m_l[:, None] & m_n)


def backward(
    weights: Tensor, pred: Tensor, images: Tensor, mask: Tensor, mean: Tensor, rstd: Tensor, p: int, q: int
) -> Tensor:
    """weights · (pred − target), [B, L, p·q·C] in the type of `pred`, 0 where mask is 0."""
    gradient = pred.new_empty(pred.shape)
    grid, shape, columns, block = _launch(pred, images, p, q)
    with torch.cuda.device_of(pred):
        backward_kernel[grid](
            *(pred, images, mask, weights, mean, rstd, gradient),
            *(pred.shape[1], columns, *pred.stride(), *images.stride()),
            **{**shape, **block.sizes},
            num_warps=block.num_warps,
        )
    return gradient


class Block(NamedTuple):
    """What one program works on: T patches of at most N values each."""

    T: int
    N: int
    num_warps: int

    @property
    def sizes(self) -> dict[str, int]:
        return {"T": self.T, "N": self.N}


def block_of(values: int) -> Block:
    """About 1,024 values in a program, 8 to a thread, so that small patches share one; at most 16 to a thread."""
    N = triton.next_power_of_2(values)
    return Block(max(1, 1024 // N), N, min(16, max(4, N // 512)))


def _launch(pred: Tensor, images: Tensor, p: int, q: int) -> tuple[tuple[int], dict[str, int], int, Block]:
    """Grid, the kernels' constants, patches in a row of the image, and the block."""
    if pred.shape[2] > MAX_VALUES:
        raise ValueError(
            f"patch_size must give patches of at most {MAX_VALUES} values for backend 'triton'; got {pred.shape[2]} "
            "(backend 'reference' has no limit)"
        )
    block = block_of(pred.shape[2])
    grid = (pred.shape[0] * triton.cdiv(pred.shape[1], block.T),)
    return grid, {"P": p, "Q": q, "C": images.shape[1]}, images.shape[3] // q, block


def configurations() -> Iterator[Configuration]:
    """Specialisations for ahead-of-time compilation: usual patches and types, and the largest patch."""
    layouts = {
        "planar": {"s_ib": "i64", "s_ic": "i64", "s_ih": "i32"},
        "channels last": {"s_ib": "i64", "s_ih": "i32", "s_iw": "i32"},
    }
    types = [("bf16", "fp32"), ("fp16", "fp16"), ("fp32", "fp32")]
    cases = [((16, 16, 3), pred, images, "planar") for pred, images in types]
    cases += [((p, q, C), "bf16", "fp32", "planar") for p, q, C in [(2, 2, 1), (4, 4, 3), (32, 32, 3)]]
    cases += [((64, 64, 4), "fp32", "fp32", "planar"), ((16, 16, 3), "bf16", "fp32", "channels last")]
    for (P, Q, C), pred, images, layout in cases:
        block = block_of(P * Q * C)
        rows = dict.fromkeys(("p_mask", "p_mean", "p_rstd"), "*fp32")
        strides = {"L": "i32", "columns": "i32", "s_pb": "i64", "s_pl": "i32", **layouts[layout]}
        unit = {"s_pn": 1, "s_iw" if layout == "planar" else "s_ic": 1}
        signature = {"p_pred": f"*{pred}", "p_images": f"*{images}", **rows, **strides}
        constants = {"P": P, "Q": Q, "C": C, **block.sizes, **unit}
        yield Configuration(
            *(forward_kernel, {**signature, "p_losses": "*fp32"}, {**constants, "EPS": EPS, "NORM": True}),
            *(block.num_warps, 1),
        )
        yield Configuration(
            *(backward_kernel, {**signature, "p_weights": "*fp32", "p_gradient": f"*{pred}"}, constants),
            *(block.num_warps, 1),
        )

"""The masked mean squared error in Triton: a program works on a few patches of one image, read where they lie.

Pixels are brought into the order of the predictions in registers, as ops/triton_patches.py tells, so that images,
predictions and their gradient are read and written 16 bytes at a time where their layout allows it.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hsv_kernels.ops.patches import patch_strides
from hsv_kernels.ops.reconstruction.reference import EPS
from hsv_kernels.ops.triton_patches import (
    Layout,
    layout_of,
    load_groups,
    place_of_groups,
    row_alignment,
    within_groups,
)
from hsv_kernels.ops.triton_utils import Configuration, round_to, triton_type

__all__ = ["backward", "configurations", "forward"]


@triton.jit
def patches_of_program(L, T: tl.constexpr):
    """Image, patches [T] within it and which of them exist."""
    blocks = tl.cdiv(L, T)
    i = tl.program_id(0).to(tl.int64)
    o_l = (i % blocks).to(tl.int32) * T + tl.arange(0, T)
    return i // blocks, o_l, o_l < L


@triton.jit
def rows_of_turn(o_l, m_t, turn, G: tl.constexpr, BG: tl.constexpr):
    """Patches, groups within them and whether they count, of each row [T · BG] of a block: BG groups of each patch."""
    T: tl.constexpr = o_l.shape[0]
    every = tl.zeros((T, BG), tl.int32)
    o_g = tl.reshape(turn * BG + tl.arange(0, BG)[None, :] + every, [T * BG])
    m_r = tl.reshape(m_t.to(tl.int32)[:, None] + every, [T * BG]) != 0
    return tl.reshape(o_l[:, None] + every, [T * BG]), o_g, m_r & (o_g < G)


@triton.jit
def load_turn(
    p_pred, p_images, i_b, o_l, m_t, turn, stride_b, stride_l, stride_n, strides,
    P: tl.constexpr, Q: tl.constexpr, C: tl.constexpr, I: tl.constexpr, V: tl.constexpr, A: tl.constexpr,
    ALIGNED: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """Pixels and predictions of one turn of the patches o_l where m_t, float32, and which of them exist; all [T, N]."""
    T: tl.constexpr = o_l.shape[0]
    o_r, o_g, m_r = rows_of_turn(o_l, m_t, turn, P * Q * C // (I * V), BG)
    o_x = place_of_groups(i_b, o_r, o_g, strides, P, Q, C, I, V, A)
    _, COLUMN, CHANNEL = strides[4:]
    b_x = load_groups(p_images, o_x, m_r, COLUMN, CHANNEL, I, V, A).to(tl.float32)  # [T · BG, J, V]

    o_n, m_n = within_groups(I, V)
    m = m_r[:, None, None] & m_n
    o_first = o_g.to(tl.int64) * (I * V)
    o_row = tl.multiple_of(i_b * stride_b + o_r.to(tl.int64) * stride_l + o_first * stride_n, ALIGNED)
    b_pred = tl.load(p_pred + o_row[:, None, None] + o_n * stride_n, mask=m, other=0).to(tl.float32)

    N: tl.constexpr = BG * b_x.shape[1] * V
    m = tl.reshape(tl.broadcast_to(m, b_x.shape), [T, N])
    return tl.reshape(b_x, [T, N]), tl.reshape(b_pred, [T, N]), m


@triton.jit
def moments(b_x, m, count):
    """Mean [T] of `count` values of each row, and the sum of the squared distances from it."""
    b_mean = tl.sum(tl.where(m, b_x, 0), 1) / count
    b_centred = tl.where(m, b_x - b_mean[:, None], 0)
    return b_mean, tl.sum(b_centred * b_centred, 1)


@triton.jit
def squared_error(b_x, b_pred, m, b_mean, b_rstd):
    """Σ (prediction − target)² [T] over what exists, the target being (x − mean) · rstd."""
    b_error = tl.where(m, b_pred - (b_x - b_mean[:, None]) * b_rstd[:, None], 0)
    return tl.sum(b_error * b_error, 1)


@triton.jit
def forward_kernel(
    p_pred, p_images, p_mask, p_losses, p_mean, p_rstd, L, stride_b, stride_l, stride_n,
    BATCH, GRID, GRID_ROW, GRID_COLUMN, ROW, COLUMN, CHANNEL, EPS: tl.constexpr, NORM: tl.constexpr,
    P: tl.constexpr, Q: tl.constexpr, C: tl.constexpr, I: tl.constexpr, V: tl.constexpr, A: tl.constexpr,
    ALIGNED: tl.constexpr, T: tl.constexpr, BG: tl.constexpr, TURNS: tl.constexpr,
):  # fmt: skip
    """Losses, means and reciprocal deviations of T patches; a large patch takes several turns."""
    n: tl.constexpr = P * Q * C
    i_b, o_l, m_l = patches_of_program(L, T)
    first = i_b * L
    b_mask = tl.load(p_mask + first + o_l, mask=m_l, other=0)  # [T]
    m_t = b_mask != 0

    strides = (BATCH, GRID, GRID_ROW, GRID_COLUMN, ROW, COLUMN, CHANNEL)
    b_x, b_pred, m = load_turn(
        p_pred, p_images, i_b, o_l, m_t, 0, stride_b, stride_l, stride_n, strides, P, Q, C, I, V, A, ALIGNED, BG
    )
    b_mean = tl.zeros([T], tl.float32)
    b_rstd = tl.where(m_t, 1.0, 0.0)
    if NORM:
        each: tl.constexpr = BG * I * V if TURNS > 1 else n
        b_mean, b_squares = moments(b_x, m, each)
        for turn in range(1, TURNS):  # moments of the parts become those of the whole
            b_y, _, m_y = load_turn(
                p_pred, p_images, i_b, o_l, m_t, turn, stride_b, stride_l, stride_n, strides,
                P, Q, C, I, V, A, ALIGNED, BG,
            )  # fmt: skip
            before, count = turn * each, tl.minimum(each, n - turn * each)
            b_other, b_more = moments(b_y, m_y, count)
            b_step = b_other - b_mean
            b_mean += b_step * count / (before + count)
            b_squares += b_more + b_step * b_step * before * count / (before + count)
        b_rstd = tl.where(m_t, 1 / tl.sqrt(b_squares / (n - 1) + EPS), 0)

    b_error = squared_error(b_x, b_pred, m, b_mean, b_rstd)
    for turn in range(1, TURNS):
        b_x, b_pred, m = load_turn(
            p_pred, p_images, i_b, o_l, m_t, turn, stride_b, stride_l, stride_n, strides, P, Q, C, I, V, A, ALIGNED, BG
        )
        b_error += squared_error(b_x, b_pred, m, b_mean, b_rstd)
    tl.store(p_losses + first + o_l, b_mask * (b_error / n), mask=m_l)
    tl.store(p_mean + first + o_l, b_mean, mask=m_l)
    tl.store(p_rstd + first + o_l, b_rstd, mask=m_l)


def forward(
    pred: Tensor, images: Tensor, mask: Tensor, p: int, q: int, norm_pix: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, means and reciprocal deviations [B, L]; `mask` contiguous float32."""
    losses, mean, rstd = (torch.empty_like(mask) for _ in range(3))
    layout, block = _block(pred, images, p, q)
    B, L, _ = pred.shape
    with torch.cuda.device_of(pred):
        forward_kernel[B * triton.cdiv(L, block.T),](
            *(pred, images, mask, losses, mean, rstd, L, *pred.stride(), *layout.strides),
            **{"EPS": EPS, "NORM": norm_pix, **layout.constants, "ALIGNED": row_alignment(pred, layout.V)},
            **{"T": block.T, "BG": block.BG, "TURNS": block.turns},
            num_warps=block.num_warps,
        )
    return losses, mean, rstd


@triton.jit
def backward_kernel(
    p_pred, p_images, p_mask, p_weights, p_mean, p_rstd, p_gradient, L, stride_b, stride_l, stride_n,
    BATCH, GRID, GRID_ROW, GRID_COLUMN, ROW, COLUMN, CHANNEL,
    P: tl.constexpr, Q: tl.constexpr, C: tl.constexpr, I: tl.constexpr, V: tl.constexpr, A: tl.constexpr,
    ALIGNED: tl.constexpr, T: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """One turn of T patches; the turns of a large patch lie along the second axis of the grid."""
    n: tl.constexpr = P * Q * C
    i_b, o_l, m_l = patches_of_program(L, T)
    first = i_b * L
    turn = tl.program_id(1)
    m_t = tl.load(p_mask + first + o_l, mask=m_l, other=0) != 0  # [T]
    b_weight = tl.load(p_weights + first + o_l, mask=m_t, other=0)
    b_mean = tl.load(p_mean + first + o_l, mask=m_t, other=0)
    b_rstd = tl.load(p_rstd + first + o_l, mask=m_t, other=0)

    strides = (BATCH, GRID, GRID_ROW, GRID_COLUMN, ROW, COLUMN, CHANNEL)
    b_x, b_pred, _ = load_turn(
        p_pred, p_images, i_b, o_l, m_t, turn, stride_b, stride_l, stride_n, strides, P, Q, C, I, V, A, ALIGNED, BG
    )
    b_gradient = (b_pred - (b_x - b_mean[:, None]) * b_rstd[:, None]) * b_weight[:, None]  # 0 where patches are visible

    o_r, o_g, m_r = rows_of_turn(o_l, m_l, turn, n // (I * V), BG)
    o_n, m_n = within_groups(I, V)
    o_out = (first + o_r) * n + o_g * (I * V)
    b_out = tl.reshape(round_to(b_gradient, p_gradient.dtype.element_ty), [T * BG, o_n.shape[1], V])
    tl.store(p_gradient + o_out[:, None, None] + o_n, b_out, mask=m_r[:, None, None] & m_n)


def backward(
    weights: Tensor, pred: Tensor, images: Tensor, mask: Tensor, mean: Tensor, rstd: Tensor, p: int, q: int
) -> Tensor:
    """weights · (pred − target), [B, L, p·q·C] in the type of `pred`, 0 where mask is 0."""
    gradient = pred.new_empty(pred.shape)
    layout, block = _block(pred, images, p, q)
    B, L, _ = pred.shape
    with torch.cuda.device_of(pred):
        backward_kernel[B * triton.cdiv(L, block.T), block.turns](
            *(pred, images, mask, weights, mean, rstd, gradient, L, *pred.stride(), *layout.strides),
            **{**layout.constants, "ALIGNED": row_alignment(pred, layout.V), "T": block.T, "BG": block.BG},
            num_warps=block.num_warps,
        )
    return gradient


class Block(NamedTuple):
    """What one program holds: BG groups of each of T patches, all of them after so many turns."""

    T: int
    BG: int
    turns: int
    num_warps: int


def block_of(layout: Layout) -> Block:
    """At least 128 threads and at most 512, each with 32 values where planes are interleaved and 16 elsewhere.

    Several small patches make a block; a patch that does not fit takes several turns.
    """
    of_thread = 32 if layout.I > 1 else 16
    BG = min(triton.next_power_of_2(layout.groups), 512 * of_thread // layout.values)
    T = max(1, 128 * of_thread // (BG * layout.values))
    return Block(T, BG, triton.cdiv(layout.groups, BG), T * BG * layout.values // of_thread // 32)


def _block(pred: Tensor, images: Tensor, p: int, q: int) -> tuple[Layout, Block]:
    narrowest = min(pred.element_size(), images.element_size())
    layout = layout_of(images, patch_strides(images, p, q), (p, q, images.shape[1]), narrowest)
    return layout, block_of(layout)


def configurations() -> Iterator[Configuration]:
    """Specialisations for ahead-of-time compilation: usual patches and types, and a patch that takes two turns."""
    planar, pixels = torch.contiguous_format, torch.channels_last
    single, half, brain = torch.float32, torch.float16, torch.bfloat16
    for (C, p), pred_type, image_type, memory_format in (
        *(((3, 16), *types, planar) for types in ((brain, single), (brain, brain), (half, half), (single, single))),
        *(((3, 16), brain, single, pixels), ((3, 14), brain, single, planar), ((3, 32), brain, single, planar)),
        *(((1, 2), brain, single, planar), ((3, 4), brain, single, planar), ((13, 8), single, single, planar)),
        ((3, 96), single, single, planar),
    ):
        images = torch.empty(1, C, 14 * p, 14 * p, dtype=image_type, device="meta", memory_format=memory_format)
        pred = torch.empty(1, 196, p * p * C, dtype=pred_type, device="meta")
        layout, block = _block(pred, images, p, p)
        rows = dict.fromkeys(("p_mask", "p_mean", "p_rstd"), "*fp32")
        pointers = {"p_pred": f"*{triton_type(pred_type)}", "p_images": f"*{triton_type(image_type)}", **rows}
        signature = {**pointers, "L": "i32", "stride_b": "i32", "stride_l": "i32", **layout.signature}
        sizes = {"ALIGNED": row_alignment(pred, layout.V), "T": block.T, "BG": block.BG}
        constants = {**layout.constants, **layout.unit_strides, **sizes, "stride_n": 1}
        turns = {"EPS": EPS, "NORM": True, "TURNS": block.turns}
        forward_signature = {**signature, "p_losses": "*fp32"}
        yield Configuration(forward_kernel, forward_signature, {**constants, **turns}, block.num_warps, 1)
        backward_signature = {**signature, "p_weights": "*fp32", "p_gradient": pointers["p_pred"]}
        yield Configuration(backward_kernel, backward_signature, constants, block.num_warps, 1)

"""Masking, gather and restore as custom operators.

Every operation but the drawing is linear, and its gradient is its adjoint: gather and scatter are each other's, restore
has one for the tokens (the visible rows) and one for the mask token (the sum of the others). Adjoints have adjoints, so
gradients can be differentiated again.
"""

import os
from typing import Any

import torch
from torch import Tensor

from hsv_kernels.backends import kernels_of
from hsv_kernels.ops.operators import differentiable, direct
from hsv_kernels.ops.tensors import computed_type

__all__ = ["gather_patches", "gather_tokens", "random_masking", "restore_tokens"]

Gradients = tuple[Tensor | None, ...]


def _check_ids(name: str, ids: Tensor, limit: int, *, permutation: bool = False) -> None:
    """With HSV_CHECK=1: numbers below `limit`, none of them twice in a row, all of them for a permutation."""
    if os.environ.get("HSV_CHECK", "0") != "1":
        return
    ordered = ids.sort(dim=1).values
    if ordered[:, 0].min() < 0 or ordered[:, -1].max() >= limit:
        found = ordered[:, 0].min().item(), ordered[:, -1].max().item()
        raise ValueError(f"{name} must lie in [0, {limit}); got numbers from {found[0]} to {found[1]}")
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        wanted = f"be a permutation of 0 … {limit - 1}" if permutation else "hold no number twice"
        raise ValueError(f"{name} must {wanted} for each sample; got duplicates")


@torch.library.custom_op("hsv_kernels::random_masking", mutates_args=())
def random_masking_op(
    seed: Tensor, offset: Tensor, batch: int, num_patches: int, num_keep: int, first_index: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return kernels_of("masking", backend).random_masking(seed, offset, batch, num_patches, num_keep, first_index)


@random_masking_op.register_fake
def _(
    seed: Tensor, offset: Tensor, batch: int, num_patches: int, num_keep: int, first_index: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    mask = seed.new_empty(batch, num_patches, dtype=torch.float32)
    return seed.new_empty(batch, num_keep), seed.new_empty(batch, num_patches), mask


_random_masking = direct(random_masking_op)


def random_masking(
    batch: int, num_patches: int, num_keep: int, seed: Tensor, offset: Tensor, first_index: int, *, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return _random_masking(seed, offset, batch, num_patches, num_keep, first_index, backend)


@torch.library.custom_op("hsv_kernels::gather_patches", mutates_args=())
def gather_patches_op(images: Tensor, ids_keep: Tensor, p: int, q: int, backend: str) -> Tensor:
    _check_ids("ids_keep", ids_keep, (images.shape[2] // p) * (images.shape[3] // q))
    return kernels_of("masking", backend).gather_patches(images, ids_keep, p, q)


@gather_patches_op.register_fake
def _(images: Tensor, ids_keep: Tensor, p: int, q: int, backend: str) -> Tensor:
    return images.new_empty(*ids_keep.shape, p * q * images.shape[1])


@torch.library.custom_op("hsv_kernels::scatter_patches", mutates_args=())
def scatter_patches_op(grad: Tensor, ids_keep: Tensor, C: int, H: int, W: int, p: int, q: int, backend: str) -> Tensor:
    return kernels_of("masking", backend).scatter_patches(grad, ids_keep, C, H, W, p, q)


@scatter_patches_op.register_fake
def _(grad: Tensor, ids_keep: Tensor, C: int, H: int, W: int, p: int, q: int, backend: str) -> Tensor:
    return grad.new_empty(grad.shape[0], C, H, W)


def _setup_gather_patches(ctx: Any, inputs: tuple, output: Tensor) -> None:
    images, ids_keep, ctx.p, ctx.q, ctx.backend = inputs
    ctx.shape = images.shape[1:]
    ctx.save_for_backward(ids_keep)


def _backward_gather_patches(ctx: Any, grad: Tensor) -> Gradients:
    return _scatter_patches(grad, *ctx.saved_tensors, *ctx.shape, ctx.p, ctx.q, ctx.backend), *[None] * 4


def _setup_scatter_patches(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.p, ctx.q, ctx.backend = inputs[5:]
    ctx.save_for_backward(inputs[1])


def _backward_scatter_patches(ctx: Any, grad: Tensor) -> Gradients:
    return _gather_patches(grad, *ctx.saved_tensors, ctx.p, ctx.q, ctx.backend), *[None] * 7


_gather_patches = differentiable(gather_patches_op, _setup_gather_patches, _backward_gather_patches)
_scatter_patches = differentiable(scatter_patches_op, _setup_scatter_patches, _backward_scatter_patches)


def gather_patches(images: Tensor, ids_keep: Tensor, p: int, q: int, *, backend: str) -> Tensor:
    return _gather_patches(images, ids_keep, p, q, backend)


@torch.library.custom_op("hsv_kernels::gather_tokens", mutates_args=())
def gather_tokens_op(tokens: Tensor, ids_keep: Tensor, backend: str) -> Tensor:
    _check_ids("ids_keep", ids_keep, tokens.shape[1])
    return kernels_of("masking", backend).gather_tokens(tokens, ids_keep)


@gather_tokens_op.register_fake
def _(tokens: Tensor, ids_keep: Tensor, backend: str) -> Tensor:
    return tokens.new_empty(*ids_keep.shape, tokens.shape[2])


@torch.library.custom_op("hsv_kernels::scatter_tokens", mutates_args=())
def scatter_tokens_op(grad: Tensor, ids_keep: Tensor, num_tokens: int, backend: str) -> Tensor:
    return kernels_of("masking", backend).scatter_tokens(grad, ids_keep, num_tokens)


@scatter_tokens_op.register_fake
def _(grad: Tensor, ids_keep: Tensor, num_tokens: int, backend: str) -> Tensor:
    return grad.new_empty(grad.shape[0], num_tokens, grad.shape[2])


def _setup_gather_tokens(ctx: Any, inputs: tuple, output: Tensor) -> None:
    tokens, ids_keep, ctx.backend = inputs
    ctx.num_tokens = tokens.shape[1]
    ctx.save_for_backward(ids_keep)


def _backward_gather_tokens(ctx: Any, grad: Tensor) -> Gradients:
    return _scatter_tokens(grad, *ctx.saved_tensors, ctx.num_tokens, ctx.backend), None, None


def _setup_scatter_tokens(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, ids_keep, _, ctx.backend = inputs
    ctx.save_for_backward(ids_keep)


def _backward_scatter_tokens(ctx: Any, grad: Tensor) -> Gradients:
    return _gather_tokens(grad, *ctx.saved_tensors, ctx.backend), None, None, None


_gather_tokens = differentiable(gather_tokens_op, _setup_gather_tokens, _backward_gather_tokens)
_scatter_tokens = differentiable(scatter_tokens_op, _setup_scatter_tokens, _backward_scatter_tokens)


def gather_tokens(tokens: Tensor, ids_keep: Tensor, *, backend: str) -> Tensor:
    return _gather_tokens(tokens, ids_keep, backend)


@torch.library.custom_op("hsv_kernels::restore_tokens", mutates_args=())
def restore_tokens_op(tokens: Tensor, ids_restore: Tensor, mask_token: Tensor, backend: str) -> Tensor:
    _check_ids("ids_restore", ids_restore, ids_restore.shape[1], permutation=True)
    return kernels_of("masking", backend).restore_tokens(tokens, ids_restore, mask_token)


@restore_tokens_op.register_fake
def _(tokens: Tensor, ids_restore: Tensor, mask_token: Tensor, backend: str) -> Tensor:
    dtype = torch.promote_types(tokens.dtype, mask_token.dtype)
    return tokens.new_empty(*ids_restore.shape, tokens.shape[2], dtype=dtype)


@torch.library.custom_op("hsv_kernels::visible_tokens", mutates_args=())
def visible_tokens_op(grad: Tensor, ids_restore: Tensor, num_keep: int, dtype: torch.dtype, backend: str) -> Tensor:
    return kernels_of("masking", backend).visible_tokens(grad, ids_restore, num_keep, dtype)


@visible_tokens_op.register_fake
def _(grad: Tensor, ids_restore: Tensor, num_keep: int, dtype: torch.dtype, backend: str) -> Tensor:
    return grad.new_empty(grad.shape[0], num_keep, grad.shape[2], dtype=dtype)


@torch.library.custom_op("hsv_kernels::masked_sum", mutates_args=())
def masked_sum_op(grad: Tensor, ids_restore: Tensor, num_keep: int, backend: str) -> Tensor:
    return kernels_of("masking", backend).masked_sum(grad, ids_restore, num_keep)


@masked_sum_op.register_fake
def _(grad: Tensor, ids_restore: Tensor, num_keep: int, backend: str) -> Tensor:
    dtype = computed_type(grad.dtype)
    return grad.new_empty(grad.shape[2], dtype=dtype)


def _setup_restore_tokens(ctx: Any, inputs: tuple, output: Tensor) -> None:
    tokens, ids_restore, mask_token, ctx.backend = inputs
    ctx.num_keep, ctx.dtypes = tokens.shape[1], (tokens.dtype, mask_token.dtype)
    ctx.save_for_backward(ids_restore)


def _backward_restore_tokens(ctx: Any, grad: Tensor) -> Gradients:
    (ids,) = ctx.saved_tensors
    tokens = mask_token = None
    if ctx.needs_input_grad[0]:
        tokens = _visible_tokens(grad, ids, ctx.num_keep, ctx.dtypes[0], ctx.backend)
    if ctx.needs_input_grad[2]:
        mask_token = _masked_sum(grad, ids, ctx.num_keep, ctx.backend).to(ctx.dtypes[1])
    return tokens, None, mask_token, None


def _setup_adjoint_of_restore(ctx: Any, inputs: tuple, output: Tensor) -> None:
    grad, ids_restore, ctx.num_keep = inputs[:3]
    ctx.batch, _, ctx.dim = grad.shape
    ctx.dtype, ctx.backend = grad.dtype, inputs[-1]
    ctx.save_for_backward(ids_restore)


def _backward_visible_tokens(ctx: Any, grad: Tensor) -> Gradients:
    nothing = grad.new_zeros(ctx.dim)
    restored = _restore_tokens(grad, *ctx.saved_tensors, nothing, ctx.backend)
    return restored.to(ctx.dtype), *[None] * 4


def _backward_masked_sum(ctx: Any, grad: Tensor) -> Gradients:
    nothing = grad.new_zeros(ctx.batch, ctx.num_keep, ctx.dim)
    restored = _restore_tokens(nothing, *ctx.saved_tensors, grad, ctx.backend)
    return restored.to(ctx.dtype), *[None] * 3


_restore_tokens = differentiable(restore_tokens_op, _setup_restore_tokens, _backward_restore_tokens)
_visible_tokens = differentiable(visible_tokens_op, _setup_adjoint_of_restore, _backward_visible_tokens)
_masked_sum = differentiable(masked_sum_op, _setup_adjoint_of_restore, _backward_masked_sum)


def restore_tokens(tokens: Tensor, ids_restore: Tensor, mask_token: Tensor, *, backend: str) -> Tensor:
    return _restore_tokens(tokens, ids_restore, mask_token.reshape(-1), backend)

"""The masked mean squared error as a custom operator with its gradient."""

from typing import Any

import torch
from torch import Tensor

from hsv_kernels.backends import kernels_of
from hsv_kernels.ops.operators import backward_operator, differentiable
from hsv_kernels.ops.reconstruction import reference
from hsv_kernels.ops.reconstruction.reference import denormalise_patches
from hsv_kernels.ops.tensors import computed_type

__all__ = ["denormalise_patches", "masked_mse"]


def masked_mse(
    pred: Tensor,
    images: Tensor,
    mask: Tensor,
    p: int,
    q: int,
    norm_pix: bool,
    reduction: str,
    *,
    backend: str,
) -> Tensor:
    """The loss of `hsv_kernels.masked_mse`, for checked inputs and a resolved backend."""
    losses, _, _ = _masked_mse(pred, images, mask, p, q, norm_pix, backend)
    return reference.reduce(losses, mask, reduction)


@torch.library.custom_op("hsv_kernels::masked_mse", mutates_args=())
def masked_mse_op(
    pred: Tensor, images: Tensor, mask: Tensor, p: int, q: int, norm_pix: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted losses, means and reciprocal deviations of the patches, [B, L]."""
    mask = mask.to(computed_type(pred.dtype)).contiguous()
    return kernels_of("reconstruction", backend).forward(pred, images, mask, p, q, norm_pix)


@masked_mse_op.register_fake
def _(
    pred: Tensor, images: Tensor, mask: Tensor, p: int, q: int, norm_pix: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    B, L, _ = pred.shape
    losses, mean, rstd = (pred.new_empty(B, L, dtype=computed_type(pred.dtype)) for _ in range(3))
    return losses, mean, rstd


@torch.library.custom_op("hsv_kernels::masked_mse_backward", mutates_args=())
def masked_mse_backward_op(
    gradient: Tensor,
    pred: Tensor,
    images: Tensor,
    mask: Tensor,
    mean: Tensor,
    rstd: Tensor,
    p: int,
    q: int,
    backend: str,
) -> Tensor:
    """Gradient of `pred`, of its shape and type and contiguous, for the gradient [B, L] of the losses."""
    mask = mask.to(computed_type(pred.dtype)).contiguous()
    weights = (gradient * mask * (2 / pred.shape[2])).contiguous()
    return kernels_of("reconstruction", backend).backward(weights, pred, images, mask, mean, rstd, p, q)


@masked_mse_backward_op.register_fake
def _(
    gradient: Tensor,
    pred: Tensor,
    images: Tensor,
    mask: Tensor,
    mean: Tensor,
    rstd: Tensor,
    p: int,
    q: int,
    backend: str,
) -> Tensor:
    return pred.new_empty(pred.shape)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    pred, images, mask, ctx.p, ctx.q, _, ctx.backend = inputs
    _, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(pred, images, mask, mean, rstd)


def _backward(ctx: Any, gradient: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    absent = (None,) * 6
    if gradient is None or not ctx.needs_input_grad[0]:
        return None, *absent
    return _masked_mse_backward(gradient, *ctx.saved_tensors, ctx.p, ctx.q, ctx.backend), *absent


_masked_mse = differentiable(masked_mse_op, _setup_context, _backward)
_masked_mse_backward = backward_operator(masked_mse_backward_op, "masked_mse")

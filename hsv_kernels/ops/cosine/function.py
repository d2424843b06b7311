"""The negative cosine of rows as a custom operator with its gradients."""

from typing import Any

import torch
from torch import Tensor

from hsv_kernels.backends import kernels_of
from hsv_kernels.ops.operators import backward_operator, differentiable
from hsv_kernels.ops.tensors import computed_type, gradient_like, reduce_losses, without_none

__all__ = ["negative_cosine"]


def negative_cosine(p: Tensor, z: Tensor, eps: float, reduction: str, *, backend: str) -> Tensor:
    """The loss of `hsv_kernels.negative_cosine`, for checked inputs and a resolved backend."""
    losses, _ = _negative_cosine(p, z, eps, backend)
    return reduce_losses(losses, reduction)


@torch.library.custom_op("hsv_kernels::negative_cosine", mutates_args=())
def negative_cosine_op(p: Tensor, z: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor]:
    """−cos(p_i, z_i) [N], and 1 / max(‖row‖, eps) of p and of z [2, N]."""
    return kernels_of("cosine", backend).forward(p, z, eps)


@negative_cosine_op.register_fake
def _(p: Tensor, z: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor]:
    losses = p.new_empty(p.shape[0], dtype=computed_type(p.dtype))
    return losses, losses.new_empty(2, p.shape[0])


@torch.library.custom_op("hsv_kernels::negative_cosine_backward", mutates_args=())
def negative_cosine_backward_op(
    grad: Tensor,
    p: Tensor,
    z: Tensor,
    losses: Tensor,
    inv_norm: Tensor,
    eps: float,
    need_p: bool,
    need_z: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(dp, dz), contiguous and of the types of p and z; empty where not needed."""
    gradients = kernels_of("cosine", backend).backward(grad, p, z, losses, inv_norm, eps, need_p, need_z)
    return without_none(gradients, (p, z))


@negative_cosine_backward_op.register_fake
def _(
    grad: Tensor,
    p: Tensor,
    z: Tensor,
    losses: Tensor,
    inv_norm: Tensor,
    eps: float,
    need_p: bool,
    need_z: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return gradient_like(p, need_p), gradient_like(z, need_z)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    p, z, ctx.eps, ctx.backend = inputs
    losses, inv_norm = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(inv_norm)
    ctx.save_for_backward(p, z, losses, inv_norm)


def _backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    need_p, need_z = ctx.needs_input_grad[:2]
    if grad is None:
        return None, None, None, None
    dp, dz = _negative_cosine_backward(grad, *ctx.saved_tensors, ctx.eps, need_p, need_z, ctx.backend)
    return dp if need_p else None, dz if need_z else None, None, None


_negative_cosine = differentiable(negative_cosine_op, _setup_context, _backward)
_negative_cosine_backward = backward_operator(negative_cosine_backward_op, "negative_cosine")

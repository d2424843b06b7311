"""The logsumexp of a square of similarities, rows against themselves, as a custom operator with its gradients."""

from typing import Any

import torch
from torch import Tensor

from hsv_kernels.backends import kernels_of
from hsv_kernels.ops.operators import backward_operator, differentiable
from hsv_kernels.ops.tensors import gradient_like, without_none

__all__ = ["square_logsumexp"]


def square_logsumexp(q: Tensor, scale: Tensor, exclude_self: bool, bfloat16: bool, *, backend: str) -> Tensor:
    """lse [n]; `scale` 0-dim, of the accumulation dtype."""
    return _square_logsumexp(q, scale, exclude_self, bfloat16, backend)[0]


@torch.library.custom_op("hsv_kernels::square_logsumexp", mutates_args=())
def square_logsumexp_op(
    q: Tensor, scale: Tensor, exclude_self: bool, bfloat16: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """lse [n] of scale · q qᵀ by rows, without the diagonal if exclude_self; and sums [2, n] as nt_xent_op's."""
    return kernels_of("contrast", backend).square_logsumexp_forward(q, scale, exclude_self, bfloat16=bfloat16)


@square_logsumexp_op.register_fake
def _(q: Tensor, scale: Tensor, exclude_self: bool, bfloat16: bool, backend: str) -> tuple[Tensor, Tensor]:
    n = q.shape[0]
    return scale.new_empty(n), scale.new_empty(2, n)


@torch.library.custom_op("hsv_kernels::square_logsumexp_backward", mutates_args=())
def square_logsumexp_backward_op(
    grad: Tensor,
    q: Tensor,
    scale: Tensor,
    sums: Tensor,
    exclude_self: bool,
    bfloat16: bool,
    need_q: bool,
    need_scale: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(dq, dscale), empty where not needed."""
    backward = kernels_of("contrast", backend).square_logsumexp_backward
    gradients = backward(grad, q, scale, sums, exclude_self, need_q, need_scale, bfloat16=bfloat16)
    return without_none(gradients, (q, scale))


@square_logsumexp_backward_op.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    scale: Tensor,
    sums: Tensor,
    exclude_self: bool,
    bfloat16: bool,
    need_q: bool,
    need_scale: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return gradient_like(q, need_q), gradient_like(scale, need_scale)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, scale, *ctx.others = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, scale, output[1])


def _backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    need_q, need_scale = ctx.needs_input_grad[:2]
    exclude_self, bfloat16, backend = ctx.others
    dq, dscale = _square_logsumexp_backward(
        grad, *ctx.saved_tensors, exclude_self, bfloat16, need_q, need_scale, backend
    )
    return dq if need_q else None, dscale if need_scale else None, None, None, None


_square_logsumexp = differentiable(square_logsumexp_op, _setup_context, _backward)
_square_logsumexp_backward = backward_operator(square_logsumexp_backward_op, "similarity_logsumexp")

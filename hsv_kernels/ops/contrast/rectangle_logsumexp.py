"""The logsumexp of a rectangle of similarities, queries against keys, as a custom operator with its gradients."""

import os
from typing import Any

import torch
from torch import Tensor

from hsv_kernels.backends import kernels_of
from hsv_kernels.ops.contrast.rectangle import Form, Saved, check_columns, logsumexp_backward
from hsv_kernels.ops.operators import backward_operator, differentiable

__all__ = ["rectangle_logsumexp"]


def rectangle_logsumexp(
    q: Tensor, k: Tensor | None, scale: Tensor, form: Form, *, backend: str
) -> Tensor | tuple[Tensor, Tensor]:
    """lse [n], or (d, positive_logit) with positives; k=None is q, `scale` 0-dim, of the accumulation dtype.

    What the forward keeps for backward is decided here, before the operator: it cannot see which of its tensors require
    a gradient. Keys that require none (a queue) are not saved and not read again, nor are labels and positive columns
    then: all may be overwritten in between.
    """
    recording = torch.is_grad_enabled()
    need_q = recording and (q.requires_grad or scale.requires_grad)
    need_k = recording and (q if k is None else k).requires_grad
    lse, positive_logit, *_ = _rectangle_logsumexp(q, k, scale, *form, need_q, need_k, backend)
    return lse if form.positive is None else (lse, positive_logit)


@torch.library.custom_op("hsv_kernels::similarity_logsumexp", mutates_args=())
def rectangle_logsumexp_op(
    q: Tensor,
    k: Tensor | None,
    scale: Tensor,
    exclude_self: bool,
    self_offset: int,
    positive: Tensor | None,
    q_labels: Tensor | None,
    k_labels: Tensor | None,
    bfloat16: bool,
    need_q: bool,
    need_k: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """lse or d [n]; positive logits [n]; and the fields of `Saved`. Empty where there are none."""
    form = Form(exclude_self, self_offset, positive, q_labels, k_labels, bfloat16)
    if form.columns is not None and (q.device.type == "cpu" or os.environ.get("HSV_CHECK", "0") == "1"):
        check_columns(form.columns, (q if k is None else k).shape[0])
    forward = kernels_of("contrast", backend, "rectangle").logsumexp_forward
    lse, positive_logit, saved = forward(q, k, scale, form, need_q, need_k)
    logit, mean_key, rows, log2_sum = (scale.new_empty(0) if x is None else x for x in (positive_logit, *saved))
    return lse, logit, mean_key, rows, log2_sum


@rectangle_logsumexp_op.register_fake
def _(
    q: Tensor,
    k: Tensor | None,
    scale: Tensor,
    exclude_self: bool,
    self_offset: int,
    positive: Tensor | None,
    q_labels: Tensor | None,
    k_labels: Tensor | None,
    bfloat16: bool,
    need_q: bool,
    need_k: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n = q.shape[0]
    gathers = need_q and positive is not None and positive.dim() == 1
    return (
        scale.new_empty(n),
        scale.new_empty(0 if positive is None else n),
        scale.new_empty(q.shape if need_q else 0),
        q.new_empty(q.shape) if gathers else scale.new_empty(0),
        scale.new_empty((2, n) if need_k else 0),
    )


@torch.library.custom_op("hsv_kernels::similarity_logsumexp_backward", mutates_args=())
def rectangle_logsumexp_backward_op(
    grad: Tensor | None,
    positive_grad: Tensor | None,
    q: Tensor,
    k: Tensor | None,
    square: bool,
    scale: Tensor,
    exclude_self: bool,
    self_offset: int,
    positive: Tensor | None,
    q_labels: Tensor | None,
    k_labels: Tensor | None,
    bfloat16: bool,
    mean_key: Tensor,
    positive_rows: Tensor,
    log2_sum: Tensor,
    need_q: bool,
    need_k: bool,
    need_scale: bool,
    need_positive: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dscale, dpositive), empty where not needed."""
    form = Form(exclude_self, self_offset, positive, q_labels, k_labels, bfloat16)
    saved = Saved(mean_key, positive_rows if positive_rows.numel() else None, log2_sum)
    needs = need_q, need_k, need_scale, need_positive
    key_gradient = kernels_of("contrast", backend, "rectangle").key_gradient
    found = logsumexp_backward(grad, positive_grad, q, k, square, scale, form, saved, *needs, key_gradient)
    dq, dk, dscale, dpositive = (scale.new_empty(0) if x is None else x for x in found)
    return dq, dk, dscale, dpositive


@rectangle_logsumexp_backward_op.register_fake
def _(
    grad: Tensor | None,
    positive_grad: Tensor | None,
    q: Tensor,
    k: Tensor | None,
    square: bool,
    scale: Tensor,
    exclude_self: bool,
    self_offset: int,
    positive: Tensor | None,
    q_labels: Tensor | None,
    k_labels: Tensor | None,
    bfloat16: bool,
    mean_key: Tensor,
    positive_rows: Tensor,
    log2_sum: Tensor,
    need_q: bool,
    need_k: bool,
    need_scale: bool,
    need_positive: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dscale, dpositive = (
        torch.empty(x.shape, dtype=x.dtype, device=q.device) if needed else scale.new_empty(0)
        for x, needed in ((q, need_q), (k, need_k), (scale, need_scale), (positive, need_positive))
    )
    return dq, dk, dscale, dpositive


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    q, k, scale, exclude_self, self_offset, positive, q_labels, k_labels, bfloat16, *others = inputs
    ctx.need_q, ctx.need_k, ctx.backend = others
    ctx.square, ctx.numbers, ctx.positives = k is None, (exclude_self, self_offset, bfloat16), positive is not None
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1 if positive is None else 2 :])
    of_keys = (k, q_labels, k_labels) if ctx.need_k else (None, None, None)
    if positive is not None and positive.dim() == 1 and not ctx.need_k:
        positive = None  # output holds the rows that it names
    ctx.save_for_backward(q, scale, positive, *of_keys, *output[2:])


def _backward(ctx: Any, grad: Tensor | None, positive_grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    q, scale, positive, k, q_labels, k_labels, *saved = ctx.saved_tensors
    exclude_self, self_offset, bfloat16 = ctx.numbers
    need_q, need_k, need_scale, _, _, need_positive = ctx.needs_input_grad[:6]
    if ((need_k or (ctx.square and need_q)) and not ctx.need_k) or ((need_q or need_scale) and not ctx.need_q):
        raise RuntimeError("similarity_logsumexp: its forward was told that no gradient is needed here")
    if not ctx.positives:
        positive_grad = None
    form = exclude_self, self_offset, positive, q_labels, k_labels, bfloat16
    needs = need_q, need_k, need_scale, need_positive
    grads = grad, positive_grad
    found = _rectangle_logsumexp_backward(*grads, q, k, ctx.square, scale, *form, *saved, *needs, ctx.backend)
    dq, dk, dscale, dpositive = (x if needed else None for x, needed in zip(found, needs, strict=True))
    return dq, dk, dscale, None, None, dpositive, None, None, None, None, None, None


_rectangle_logsumexp = differentiable(rectangle_logsumexp_op, _setup_context, _backward)
_rectangle_logsumexp_backward = backward_operator(rectangle_logsumexp_backward_op, "similarity_logsumexp")

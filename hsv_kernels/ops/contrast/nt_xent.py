"""NT-Xent as a custom operator with its gradients."""

import math
from typing import Any

import torch
from torch import Tensor

from hsv_kernels.backends import kernels_of
from hsv_kernels.ops.contrast import reference
from hsv_kernels.ops.contrast.cpu import kept_values
from hsv_kernels.ops.operators import backward_operator, differentiable, reference_operator
from hsv_kernels.ops.tensors import computed_type, gradient_like, reduce_losses, scalar_like, without_none

__all__ = ["has_fixed_shift", "nt_xent"]

#: Most bytes of exponentials that the CPU's forward keeps for backward.
KEPT_BYTES = 8 << 20


def nt_xent(
    z0: Tensor, z1: Tensor, temperature: float | Tensor, bfloat16: bool, reduction: str, *, backend: str
) -> Tensor:
    """The loss of two views [N, D], or per-anchor losses [2N]; `temperature` is a positive number or a 0-dim tensor."""
    if backend == "reference":
        return reduce_losses(_reference_nt_xent(z0, z1, temperature, bfloat16), reduction)
    fixed_shift = not isinstance(temperature, Tensor) and has_fixed_shift(temperature, 2 * z0.shape[0])
    keep = backend == "cpu" and fixed_shift and _needs_gradient(z0, z1) and _fits(z0)
    scalar = scalar_like(temperature, z0)
    return _nt_xent(z0, z1, scalar, fixed_shift, bfloat16, keep, reduction, backend)[0]


def has_fixed_shift(temperature: float, rows: int) -> bool:
    """True while 1 / temperature + ln(rows) < 64: then sums of exp S stay in range without a maximum."""
    return rows < math.exp(64 - 1 / temperature)


def _needs_gradient(*tensors: Tensor) -> bool:
    """Whether a forward of these tensors will be followed by a backward, as far as autograd knows."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _fits(z0: Tensor) -> bool:
    """Whether the exponentials of NT-Xent are few enough to be kept."""
    return kept_values(2 * z0.shape[0]) * computed_type(z0.dtype).itemsize <= KEPT_BYTES


def _per_row(grad: Tensor, rows: int, reduction: str) -> Tensor:
    """The gradient of each of so many losses, from that of their reduction."""
    if reduction == "none":
        return grad
    return (grad / rows if reduction == "mean" else grad).expand(rows)


@torch.library.custom_op("hsv_kernels::nt_xent", mutates_args=())
def nt_xent_op(
    z0: Tensor,
    z1: Tensor,
    temperature: Tensor,
    fixed_shift: bool,
    bfloat16: bool,
    keep: bool,
    reduction: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The reduced losses and, for backward, sums, d = lse − S_pos [2N], inv_norm and one more tensor.

    The sums over the negatives, [2, 2N], are a shift and a total on the CPU, a factor and a shift in Triton; inv_norm
    is 1 / max(‖row‖, 1e-12) [2N] in Triton; the last tensor is the normalised rows in Triton and exponentials on the
    CPU, if `keep`. What is not there is empty.
    fixed_shift says that the caller knows exponentials to be in range; without it the backend decides or takes a
    maximum off. The reduction is the operator's, because an operation of autograd's costs more than a small loss does.
    """
    forward = kernels_of("contrast", backend).nt_xent_forward
    losses, *saved = forward(z0, z1, temperature, fixed_shift or None, bfloat16, keep)
    return reduce_losses(losses, reduction), *saved


@nt_xent_op.register_fake
def _(
    z0: Tensor,
    z1: Tensor,
    temperature: Tensor,
    fixed_shift: bool,
    bfloat16: bool,
    keep: bool,
    reduction: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = 2 * z0.shape[0]
    loss = temperature.new_empty(rows if reduction == "none" else ())
    d = temperature.new_empty(rows)
    sums = temperature.new_empty(2, rows)
    if backend == "cpu":
        return loss, sums, d, temperature.new_empty(0), temperature.new_empty(kept_values(rows) if keep else 0)
    width, dtype = kernels_of("contrast", backend).saved_rows(z0, bfloat16)
    z = z0.new_empty(rows, width, dtype=dtype)
    return loss, sums, d, temperature.new_empty(rows), z


@torch.library.custom_op("hsv_kernels::nt_xent_backward", mutates_args=())
def nt_xent_backward_op(
    grad: Tensor,
    z0: Tensor,
    z1: Tensor,
    temperature: Tensor,
    sums: Tensor,
    d: Tensor,
    inv_norm: Tensor,
    exponentials: Tensor,
    need_z: bool,
    need_temperature: bool,
    fixed_shift: bool,
    bfloat16: bool,
    reduction: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dz0, dz1, dtemperature), empty where not needed."""
    saved = (_per_row(grad, len(d), reduction), z0, z1, temperature, sums, d, inv_norm, exponentials)
    backward = kernels_of("contrast", backend).nt_xent_backward
    gradients = backward(*saved, need_z, need_temperature, fixed_shift or None, bfloat16)
    return without_none(gradients, (z0, z1, temperature))


@nt_xent_backward_op.register_fake
def _(
    grad: Tensor,
    z0: Tensor,
    z1: Tensor,
    temperature: Tensor,
    sums: Tensor,
    d: Tensor,
    inv_norm: Tensor,
    exponentials: Tensor,
    need_z: bool,
    need_temperature: bool,
    fixed_shift: bool,
    bfloat16: bool,
    reduction: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return gradient_like(z0, need_z), gradient_like(z1, need_z), gradient_like(temperature, need_temperature)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    z0, z1, temperature, *others = inputs
    ctx.fixed_shift, ctx.bfloat16, _, ctx.reduction, ctx.backend = others
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(z0, z1, temperature, *output[1:])


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    need_z0, need_z1, need_temperature = ctx.needs_input_grad[:3]
    dz0, dz1, dtemperature = _nt_xent_backward(
        *(grad, *ctx.saved_tensors, need_z0 or need_z1, need_temperature),
        *(ctx.fixed_shift, ctx.bfloat16, ctx.reduction, ctx.backend),
    )
    needed = (dz0 if need_z0 else None, dz1 if need_z1 else None, dtemperature if need_temperature else None)
    return *needed, None, None, None, None, None


_nt_xent = differentiable(nt_xent_op, _setup_context, _backward)
_nt_xent_backward = backward_operator(nt_xent_backward_op, "nt_xent")
_reference_nt_xent = reference_operator(reference.nt_xent, "nt_xent")

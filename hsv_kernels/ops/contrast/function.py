"""The contrast operations as custom operators with their gradients."""

import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from hsv_kernels.ops.contrast import reference
from hsv_kernels.ops.contrast.cpu import kept_values
from hsv_kernels.ops.contrast.rectangle import Form
from hsv_kernels.ops.contrast.similarity_logsumexp import similarity_logsumexp as _rectangle_logsumexp
from hsv_kernels.ops.operators import backward_operator, differentiable, reference_operator
from hsv_kernels.ops.tensors import computed_type

_reference_nt_xent = reference_operator(reference.nt_xent, "nt_xent")
_reference_similarity_logsumexp = reference_operator(reference.similarity_logsumexp, "similarity_logsumexp")


#: Most bytes of exponentials that the CPU's forward keeps for backward.
KEPT_BYTES = 8 << 20


def nt_xent(
    z0: Tensor, z1: Tensor, temperature: float | Tensor, bfloat16: bool, reduction: str, *, backend: str
) -> Tensor:
    """The loss of two views [N, D], or per-anchor losses [2N]; `temperature` is a positive number or a 0-dim tensor."""
    if backend == "reference":
        return _reduce(_reference_nt_xent(z0, z1, temperature, bfloat16), reduction)
    fixed_shift = not isinstance(temperature, Tensor) and has_fixed_shift(temperature, 2 * z0.shape[0])
    keep = backend == "cpu" and fixed_shift and needs_gradient(z0, z1) and _fits(z0)
    scalar = _scalar(temperature, z0)
    return _differentiable_nt_xent(z0, z1, scalar, fixed_shift, bfloat16, keep, reduction, backend)[0]


def _reduce(losses: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    return losses.mean() if reduction == "mean" else losses.sum()


def _per_row(grad: Tensor, rows: int, reduction: str) -> Tensor:
    """The gradient of each of so many losses, from that of their reduction."""
    if reduction == "none":
        return grad
    return (grad / rows if reduction == "mean" else grad).expand(rows)


def needs_gradient(*tensors: Tensor) -> bool:
    """Whether a forward of these tensors will be followed by a backward, as far as autograd knows."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _fits(z0: Tensor) -> bool:
    """Whether the exponentials of NT-Xent are few enough to be kept."""
    return kept_values(2 * z0.shape[0]) * computed_type(z0.dtype).itemsize <= KEPT_BYTES


def similarity_logsumexp(
    q: Tensor, k: Tensor | None, scale: float | Tensor, form: Form, *, backend: str
) -> Tensor | tuple[Tensor, Tensor]:
    """lse [n], or (d, positive_logit) with positives."""
    if backend == "reference":
        if k is not None and not k.requires_grad:
            k = k.clone()  # a queue may be overwritten before backward, which runs the definition again
        return _reference_similarity_logsumexp(q, k, scale, *form)
    if is_square(k, form):
        return _differentiable_square_logsumexp(q, _scalar(scale, q), form.exclude_self, form.bfloat16, backend)[0]
    return _rectangle_logsumexp(q, k, _scalar(scale, q), form, backend=backend)


def is_square(k: Tensor | None, form: Form) -> bool:
    """Whether q is held against itself and nothing but the diagonal is left out: a problem with a symmetry to it."""
    return k is None and form.self_offset == 0 and form.positive is None and form.q_labels is None


def has_fixed_shift(temperature: float, rows: int) -> bool:
    """True while 1 / temperature + ln(rows) < 64: then sums of exp S stay in range without a maximum."""
    return rows < math.exp(64 - 1 / temperature)


def _scalar(value: float | Tensor, like: Tensor) -> Tensor:
    """`value` as a 0-dim tensor of the accumulation dtype on the device of `like`."""
    dtype = computed_type(like.dtype)
    return value.to(dtype) if isinstance(value, Tensor) else torch.full((), value, dtype=dtype, device=like.device)


def _kernels(backend: str) -> ModuleType:
    if backend == "cpu":
        from hsv_kernels.ops.contrast import cpu as kernels
    else:
        from hsv_kernels.ops.contrast import triton_kernels as kernels
    return kernels


@torch.library.custom_op("hsv_kernels::nt_xent", mutates_args=())
def _nt_xent(
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
    losses, *saved = _kernels(backend).nt_xent_forward(z0, z1, temperature, fixed_shift or None, bfloat16, keep)
    return _reduce(losses, reduction), *saved


@_nt_xent.register_fake
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
    width, dtype = _kernels(backend).saved_rows(z0, bfloat16)
    z = z0.new_empty(rows, width, dtype=dtype)
    return loss, sums, d, temperature.new_empty(rows), z


@torch.library.custom_op("hsv_kernels::nt_xent_backward", mutates_args=())
def _nt_xent_backward(
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
    gradients = _kernels(backend).nt_xent_backward(*saved, need_z, need_temperature, fixed_shift or None, bfloat16)
    return _filled(gradients, (z0, z1, temperature))


@_nt_xent_backward.register_fake
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
    return _like(z0, need_z), _like(z1, need_z), _like(temperature, need_temperature)


def _save_nt_xent(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    z0, z1, temperature, *others = inputs
    ctx.fixed_shift, ctx.bfloat16, _, ctx.reduction, ctx.backend = others
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(z0, z1, temperature, *output[1:])


def _nt_xent_gradient(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    need_z0, need_z1, need_temperature = ctx.needs_input_grad[:3]
    dz0, dz1, dtemperature = _raising_nt_xent_backward(
        *(grad, *ctx.saved_tensors, need_z0 or need_z1, need_temperature),
        *(ctx.fixed_shift, ctx.bfloat16, ctx.reduction, ctx.backend),
    )
    needed = (dz0 if need_z0 else None, dz1 if need_z1 else None, dtemperature if need_temperature else None)
    return *needed, None, None, None, None, None


_raising_nt_xent_backward = backward_operator(_nt_xent_backward, "nt_xent")
_differentiable_nt_xent = differentiable(_nt_xent, _save_nt_xent, _nt_xent_gradient)


@torch.library.custom_op("hsv_kernels::square_logsumexp", mutates_args=())
def _square_logsumexp(
    q: Tensor, scale: Tensor, exclude_self: bool, bfloat16: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """lse [n] of scale · q qᵀ by rows, without the diagonal if exclude_self; and sums [2, n] as _nt_xent's."""
    return _kernels(backend).square_logsumexp_forward(q, scale, exclude_self, bfloat16=bfloat16)


@_square_logsumexp.register_fake
def _(q: Tensor, scale: Tensor, exclude_self: bool, bfloat16: bool, backend: str) -> tuple[Tensor, Tensor]:
    n = q.shape[0]
    return scale.new_empty(n), scale.new_empty(2, n)


@torch.library.custom_op("hsv_kernels::square_logsumexp_backward", mutates_args=())
def _square_logsumexp_backward(
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
    backward = _kernels(backend).square_logsumexp_backward
    gradients = backward(grad, q, scale, sums, exclude_self, need_q, need_scale, bfloat16=bfloat16)
    return _filled(gradients, (q, scale))


@_square_logsumexp_backward.register_fake
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
    return _like(q, need_q), _like(scale, need_scale)


def _save_square_logsumexp(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, scale, *ctx.others = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, scale, output[1])


def _square_logsumexp_gradient(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    need_q, need_scale = ctx.needs_input_grad[:2]
    exclude_self, bfloat16, backend = ctx.others
    dq, dscale = _raising_square_logsumexp_backward(
        grad, *ctx.saved_tensors, exclude_self, bfloat16, need_q, need_scale, backend
    )
    return dq if need_q else None, dscale if need_scale else None, None, None, None


_raising_square_logsumexp_backward = backward_operator(_square_logsumexp_backward, "similarity_logsumexp")
_differentiable_square_logsumexp = differentiable(_square_logsumexp, _save_square_logsumexp, _square_logsumexp_gradient)


def _like(tensor: Tensor, needed: bool) -> Tensor:
    """Contiguous and uninitialised, of the shape of `tensor` if needed and empty otherwise."""
    return tensor.new_empty(tensor.shape if needed else 0)


def _filled(gradients: tuple[Tensor | None, ...], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """`gradients` with empty tensors in place of None: an operator returns tensors."""
    return tuple(_like(x, False) if g is None else g for g, x in zip(gradients, inputs, strict=True))

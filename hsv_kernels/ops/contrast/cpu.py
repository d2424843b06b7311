"""The contrast operations on CPU tensors: allocates outputs and workspace and hands pointers to the compiled kernels.

Plain tensors in and out, no autograd. Values per row are float64 for float64 rows and float32 otherwise; gradients of
rows have the rows' type. Rows may have any stride. The workspace is O(M · D): M rows packed once for a forward, twice
for a backward, and their gradients.

Two choices are the same everywhere. `fixed_shift`: True sums exponentials as they are, which needs |logits| + log(rows)
< 64, False takes running maxima off, None lets the kernel decide by a bound on the logits. `bfloat16`: products of rows
rounded to bfloat16, where the instruction set has them (avx512bf16) and the rows are not float64; in float32 elsewhere.
"""

import math
from typing import Any

import torch
from torch import Tensor

from hsv_kernels.backends import compiled_module
from hsv_kernels.ops.contrast import cpu_rectangle
from hsv_kernels.ops.contrast.rectangle import Form, logsumexp_backward
from hsv_kernels.ops.cpu_utils import threads
from hsv_kernels.ops.tensors import computed_type, dtype_code

__all__ = [
    "kept_values",
    "nt_xent_backward",
    "nt_xent_forward",
    "square_logsumexp_backward",
    "square_logsumexp_forward",
]

_STRIP = 32  # csrc/cpu/contrast.h, kStrip
_SHIFTS = {None: 0, True: 1, False: 2}  # csrc/cpu/contrast.h, enum Shift


def nt_xent_forward(
    z0: Tensor,
    z1: Tensor,
    temperature: Tensor,
    fixed_shift: bool | None = None,
    bfloat16: bool = False,
    keep: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The per-anchor losses of NT-Xent and what backward needs of them.

        lse_i = log Σ_{j≠i,pos(i)} exp S_ij,   d_i = lse_i − S_i,pos(i),   loss_i = softplus(d_i)

    Args:
        z0, z1: [N, D] of one dtype, not normalised.
        temperature: 0-dim; a value that is not positive and finite gives NaN.
        keep: return the exponentials for backward: 2 N² values; needs the fixed shift.

    Returns:
        losses [2N]; sums [2, 2N], of which 2^sums[0] · sums[1] is Σ exp S_ij; d [2N]; an empty tensor, for norms are
        taken again; the exponentials, empty unless kept. A single pair has d = −inf and loss 0.
    """
    problem = _problem((z0, z1), _inverse(temperature), True, fixed_shift, bfloat16)
    rows = 2 * z0.shape[0]
    losses, sums, d = _row_values(z0, rows), _row_values(z0, 2, rows), _row_values(z0, rows)
    kept = _row_values(z0, kept_values(rows) if keep else 0)
    workspace = _workspace(problem, backward=False)
    _C().contrast_forward(
        *(problem, workspace.data_ptr(), 0),
        *(t.data_ptr() for t in (losses, d, sums)),
        kept.data_ptr() if keep else 0,
    )
    return losses, sums, d, _row_values(z0, 0), kept


def nt_xent_backward(
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
    fixed_shift: bool | None = None,
    bfloat16: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of Σ grad_i · loss_i: dz0 and dz1 (None unless need_z) and dtemperature (None unless need_temperature).

    Takes grad [2N] of any stride, the inputs of `nt_xent_forward` and what it returned.
    """
    scale = _inverse(temperature)
    problem = _problem((z0, z1), scale, True, fixed_shift, bfloat16)
    saved = [t.contiguous() for t in (grad.to(d.dtype), sums, d)]
    row_grads, dscale = _backward(problem, saved, (z0, z1), need_z, need_temperature, exponentials)
    dz0, dz1 = row_grads or (None, None)
    return dz0, dz1, None if dscale is None else (-dscale * scale * scale).to(temperature.dtype)


def kept_values(rows: int) -> int:
    """Exponentials kept for so many rows: those in columns right of the row's strip."""
    columns = (rows + _STRIP - 1) // _STRIP * _STRIP
    return columns * (columns - _STRIP) // 2


def square_logsumexp_forward(
    q: Tensor,
    scale: Tensor,
    exclude_self: bool,
    fixed_shift: bool | None = None,
    bfloat16: bool = False,
) -> tuple[Tensor, Tensor]:
    """lse_i = log Σ_j exp(scale · q_i · q_j) [n] for q [n, D].

    Column i is left out of row i with exclude_self. A row without candidates gives −inf. Returns lse and for backward
    sums [2, n], of which 2^sums[0] · sums[1] is exp(lse), where the scale is positive.
    """
    if not float(scale) > 0:  # the symmetric path shares √scale between both sides
        form = Form(exclude_self, 0, None, None, None, bfloat16)
        return cpu_rectangle.logsumexp_forward(q, None, scale, form, False, False)[0], _row_values(q, 2, len(q)).zero_()
    problem = _problem((q,), float(scale), exclude_self, fixed_shift, bfloat16)
    lse, sums = _row_values(q, len(q)), _row_values(q, 2, len(q))
    workspace = _workspace(problem, backward=False)
    _C().contrast_forward(problem, workspace.data_ptr(), lse.data_ptr(), 0, 0, sums.data_ptr(), 0)
    return lse, sums


def square_logsumexp_backward(
    grad: Tensor,
    q: Tensor,
    scale: Tensor,
    sums: Tensor,
    exclude_self: bool,
    need_q: bool,
    need_scale: bool,
    fixed_shift: bool | None = None,
    bfloat16: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of Σ grad_i · lse_i: dq, the sum of both roles of q (None unless need_q), and dscale likewise."""
    if not float(scale) > 0:
        form = Form(exclude_self, 0, None, None, None, bfloat16)
        saved = cpu_rectangle.logsumexp_forward(q, None, scale, form, True, need_q)[2]
        needs = need_q, False, need_scale, False, cpu_rectangle.key_gradient
        dq, _, dscale, _ = logsumexp_backward(grad, None, q, None, True, scale, form, saved, *needs)
        return dq, dscale
    problem = _problem((q,), float(scale), exclude_self, fixed_shift, bfloat16)
    saved = [grad.to(sums.dtype).contiguous(), sums.contiguous(), None]
    row_grads, dscale = _backward(problem, saved, (q,), need_q, need_scale, None)
    return row_grads[0] if row_grads else None, None if dscale is None else dscale.to(scale.dtype)


def _C() -> Any:
    return compiled_module()


def _inverse(temperature: Tensor) -> float:
    value = float(temperature)
    return 1 / value if 0 < value < math.inf else math.nan


def _problem(
    views: tuple[Tensor, ...],
    scale: float,
    exclude_self: bool,
    fixed_shift: bool | None,
    bfloat16: bool,
) -> Any:
    rows, dim = views[0].shape
    return _C().ContrastProblem(
        dtype=dtype_code(views[0]),
        views=[(view.data_ptr(), view.stride(0), view.stride(1)) for view in views],
        rows=rows,
        dim=dim,
        scale=scale,
        exclude_self=exclude_self,
        bfloat16=bfloat16 or views[0].dtype == torch.bfloat16,
        shift=_SHIFTS[fixed_shift],
        threads=threads(),
    )


def _row_values(rows: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=computed_type(rows.dtype))


def _workspace(problem: Any, *, backward: bool) -> Tensor:
    return torch.empty(_C().contrast_workspace(problem, backward), dtype=torch.uint8)


def _backward(
    problem: Any,
    saved: list[Tensor | None],
    views: tuple[Tensor, ...],
    need_rows: bool,
    need_scale: bool,
    exponentials: Tensor | None,
) -> tuple[list[Tensor] | None, Tensor | None]:
    """Gradients of the views' rows and of the scale (float64, 0-dim), from grad, sums and d."""
    row_grads = [torch.empty(view.shape, dtype=view.dtype) for view in views] if need_rows else []
    dscale = torch.empty((), dtype=torch.float64) if need_scale else None
    if need_rows or need_scale:
        workspace = _workspace(problem, backward=True)
        _C().contrast_backward(
            *(problem, workspace.data_ptr()),
            *(0 if t is None else t.data_ptr() for t in saved),
            [t.data_ptr() for t in row_grads],
            0 if dscale is None else dscale.data_ptr(),
            exponentials.data_ptr() if exponentials is not None and exponentials.numel() else 0,
        )
    return row_grads or None, dscale

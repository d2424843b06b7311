"""The contrast operations on CPU tensors: allocates outputs and workspace and hands pointers to the compiled kernels.

Plain tensors in and out, no autograd. Values per row are float64 for float64 rows and float32 otherwise; gradients of
rows have the rows' type. Rows may have any stride. The workspace is O(M · D): M rows packed once for a forward, twice
for a backward, and their gradients.
"""

import math
from typing import Any

import torch
from torch import Tensor

from hsv_kernels.backends import compiled_module

_DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def nt_xent_forward(
    z0: Tensor, z1: Tensor, temperature: Tensor, fixed_shift: bool, threads: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The per-anchor losses of NT-Xent and what backward needs of them.

        lse_i = log Σ_{j≠i,pos(i)} exp S_ij,   d_i = lse_i − S_i,pos(i),   loss_i = softplus(d_i)

    Args:
        z0, z1: [N, D] of one dtype, not normalised.
        temperature: 0-dim; a value that is not positive and finite gives NaN.
        fixed_shift: sum exponentials as they are; needs 1/temperature + log 2N < 64. False takes running maxima off.
        threads: at most so many; None is torch.get_num_threads().

    Returns:
        losses, lse, d and inv_norm = 1 / max(‖x‖, 1e-12), each [2N]. A single pair has lse = d = −inf and loss 0.
    """
    problem = _problem((z0, z1), _inverse(temperature), True, fixed_shift, threads)
    losses, lse, d, inv_norm = (_row_values(z0, 2 * z0.shape[0]) for _ in range(4))
    workspace = _workspace(problem, backward=False, need_rows=False)
    _C().contrast_forward(problem, workspace.data_ptr(), *(t.data_ptr() for t in (lse, losses, d, inv_norm)))
    return losses, lse, d, inv_norm


def nt_xent_backward(
    grad: Tensor,
    z0: Tensor,
    z1: Tensor,
    temperature: Tensor,
    lse: Tensor,
    d: Tensor,
    inv_norm: Tensor,
    fixed_shift: bool,
    need_z: bool,
    need_temperature: bool,
    threads: int | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of Σ grad_i · loss_i: dz0 and dz1 (None unless need_z) and dtemperature (None unless need_temperature).

    Takes grad [2N] of any stride, the inputs of `nt_xent_forward` and what it returned.
    """
    scale = _inverse(temperature)
    problem = _problem((z0, z1), scale, True, fixed_shift, threads)
    saved = [t.contiguous() for t in (grad.to(lse.dtype), lse, d, inv_norm)]
    row_grads, dscale = _backward(problem, saved, (z0, z1), need_z, need_temperature)
    dz0, dz1 = row_grads or (None, None)
    return dz0, dz1, None if dscale is None else (dscale * -(scale**2)).to(temperature.dtype)


def square_logsumexp_forward(q: Tensor, scale: Tensor, exclude_self: bool, threads: int | None = None) -> Tensor:
    """lse_i = log Σ_j exp(scale · q_i · q_j) [n] for q [n, D], column i left out of row i with exclude_self.

    Always over running maxima: nothing bounds q. A row without candidates gives −inf.
    """
    problem = _problem((q,), float(scale), exclude_self, False, threads)
    lse = _row_values(q, q.shape[0])
    workspace = _workspace(problem, backward=False, need_rows=False)
    _C().contrast_forward(problem, workspace.data_ptr(), lse.data_ptr(), 0, 0, 0)
    return lse


def square_logsumexp_backward(
    grad: Tensor,
    q: Tensor,
    scale: Tensor,
    lse: Tensor,
    exclude_self: bool,
    need_q: bool,
    need_scale: bool,
    threads: int | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of Σ grad_i · lse_i: dq, the sum of both roles of q (None unless need_q), and dscale likewise."""
    problem = _problem((q,), float(scale), exclude_self, False, threads)
    saved = [grad.to(lse.dtype).contiguous(), lse.contiguous(), None, None]
    row_grads, dscale = _backward(problem, saved, (q,), need_q, need_scale)
    return row_grads[0] if row_grads else None, None if dscale is None else dscale.to(scale.dtype)


def _C() -> Any:
    return compiled_module()


def _inverse(temperature: Tensor) -> float:
    value = float(temperature)
    return 1 / value if 0 < value < math.inf else math.nan


def _problem(
    views: tuple[Tensor, ...], scale: float, exclude_self: bool, fixed_shift: bool, threads: int | None
) -> Any:
    rows, dim = views[0].shape
    return _C().ContrastProblem(
        dtype=_DTYPE_CODES[views[0].dtype],
        views=[(view.data_ptr(), view.stride(0), view.stride(1)) for view in views],
        rows=rows,
        dim=dim,
        scale=scale,
        exclude_self=exclude_self,
        fixed_shift=fixed_shift,
        threads=torch.get_num_threads() if threads is None else threads,
    )


def _row_values(rows: Tensor, n: int) -> Tensor:
    return torch.empty(n, dtype=torch.float64 if rows.dtype == torch.float64 else torch.float32)


def _workspace(problem: Any, *, backward: bool, need_rows: bool) -> Tensor:
    return torch.empty(_C().contrast_workspace(problem, backward, need_rows), dtype=torch.uint8)


def _backward(
    problem: Any, saved: list[Tensor | None], views: tuple[Tensor, ...], need_rows: bool, need_scale: bool
) -> tuple[list[Tensor] | None, Tensor | None]:
    """Gradients of the views' rows and of the scale (float64, 0-dim), from grad, lse, d and inv_norm."""
    row_grads = [torch.empty(view.shape, dtype=view.dtype) for view in views] if need_rows else []
    dscale = torch.empty((), dtype=torch.float64) if need_scale else None
    if need_rows or need_scale:
        workspace = _workspace(problem, backward=True, need_rows=need_rows)
        _C().contrast_backward(
            *(problem, workspace.data_ptr()),
            *(0 if t is None else t.data_ptr() for t in saved),
            [t.data_ptr() for t in row_grads],
            0 if dscale is None else dscale.data_ptr(),
        )
    return row_grads or None, dscale

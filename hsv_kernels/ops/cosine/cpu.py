"""The negative cosine of rows through hsv_kernels._C."""

from typing import Any

import torch
from torch import Tensor

from hsv_kernels.backends import compiled_module
from hsv_kernels.ops.cpu_utils import threads
from hsv_kernels.ops.tensors import computed_type, dtype_code, unit_stride

__all__ = ["backward", "forward"]


def forward(p: Tensor, z: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """−cos(p_i, z_i) [N], and 1 / max(‖row‖, eps) of p and of z [2, N]."""
    p, z = unit_stride(p), unit_stride(z)
    losses = torch.empty(len(p), dtype=computed_type(p.dtype))
    inv_norm = losses.new_empty(2, len(p))
    compiled_module().cosine_forward(_problem(p, z, eps), losses.data_ptr(), inv_norm.data_ptr())
    return losses, inv_norm


def backward(
    grad: Tensor, p: Tensor, z: Tensor, losses: Tensor, inv_norm: Tensor, eps: float, need_p: bool, need_z: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of p and z [N, D] in their types, for the gradient [N] of the losses; None where not needed."""
    p, z, grad, losses, inv_norm = unit_stride(p), unit_stride(z), *(x.contiguous() for x in (grad, losses, inv_norm))
    dp, dz = (torch.empty(p.shape, dtype=p.dtype) if needed else None for needed in (need_p, need_z))
    compiled_module().cosine_backward(
        _problem(p, z, eps),
        *(x.data_ptr() for x in (grad, losses, inv_norm)),
        *(0 if x is None else x.data_ptr() for x in (dp, dz)),
    )
    return dp, dz


def _problem(p: Tensor, z: Tensor, eps: float) -> Any:
    return compiled_module().CosineProblem(
        dtype=dtype_code(p),
        p=(p.data_ptr(), p.stride(0)),
        z=(z.data_ptr(), z.stride(0)),
        rows=p.shape[0],
        dim=p.shape[1],
        eps=eps,
        threads=threads(),
    )

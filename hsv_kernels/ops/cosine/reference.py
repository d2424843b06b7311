"""The definition of the negative cosine of rows in plain PyTorch."""

import torch
from torch import Tensor

from hsv_kernels.ops.tensors import computed_type

__all__ = ["backward", "forward"]


def forward(p: Tensor, z: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """−cos(p_i, z_i) [N], and 1 / max(‖row‖, eps) of p and of z [2, N]."""
    p, z = (x.to(computed_type(x.dtype)) for x in (p, z))
    inv_norm = torch.stack([p, z]).norm(dim=2).clamp_min(eps).reciprocal()
    return -(p * z).sum(1) * inv_norm[0] * inv_norm[1], inv_norm


def backward(
    grad: Tensor, p: Tensor, z: Tensor, losses: Tensor, inv_norm: Tensor, eps: float, need_p: bool, need_z: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of p and z [N, D] in their types, for the gradient [N] of the losses; None where not needed.

    With u = p / ‖p‖ and v = z / ‖z‖, dp = −grad (v + loss · u) / ‖p‖; a norm below eps is the constant eps.
    """

    most = inv_norm.new_full((), eps).reciprocal()  # of a norm below eps

    def of(x: Tensor, y: Tensor, of_x: Tensor, of_y: Tensor) -> Tensor:
        along = torch.where(of_x < most, losses * of_x, 0)
        units = of_y[:, None] * y.to(grad.dtype) + along[:, None] * x.to(grad.dtype)
        return (-(grad * of_x)[:, None] * units).to(x.dtype)

    of_p, of_z = inv_norm
    return of(p, z, of_p, of_z) if need_p else None, of(z, p, of_z, of_p) if need_z else None

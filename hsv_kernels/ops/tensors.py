"""What every operation asks of its tensors: types, rows without gaps, losses reduced, gradients."""

import torch
from torch import Tensor

__all__ = [
    "computed_type",
    "dtype_code",
    "gradient_like",
    "reduce_losses",
    "scalar_like",
    "unit_stride",
    "without_none",
]

#: csrc/cpu/elements.h, enum DType.
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def dtype_code(tensor: Tensor) -> int:
    """Number of the tensor's dtype in csrc/cpu/elements.h."""
    return DTYPE_CODES[tensor.dtype]


def computed_type(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def unit_stride(x: Tensor) -> Tensor:
    """`x` with neighbouring values along its last dimension: itself, or a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def scalar_like(value: float | Tensor, like: Tensor) -> Tensor:
    """`value` as a 0-dim tensor of the type that `like` is computed in, on its device."""
    dtype = computed_type(like.dtype)
    return value.to(dtype) if isinstance(value, Tensor) else torch.full((), value, dtype=dtype, device=like.device)


def reduce_losses(losses: Tensor, reduction: str, weights: Tensor | None = None) -> Tensor:
    """Losses [N] times their weights as they are, their sum, or that over the sum of the weights (0 where it is 0)."""
    weights = None if weights is None else weights.to(losses.dtype)
    losses = losses if weights is None else losses * weights
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    if weights is None:
        return losses.mean()
    total = weights.sum()
    return losses.sum() / total.where(total != 0, 1)


def gradient_like(tensor: Tensor, needed: bool) -> Tensor:
    """Contiguous and uninitialised, of the shape of `tensor` if needed and empty otherwise."""
    return tensor.new_empty(tensor.shape if needed else 0)


def without_none(gradients: tuple[Tensor | None, ...], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """`gradients` with empty tensors in place of None: an operator returns tensors."""
    return tuple(gradient_like(x, False) if g is None else g for g, x in zip(gradients, inputs, strict=True))

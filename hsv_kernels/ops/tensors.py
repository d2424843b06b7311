"""What every operation asks of its tensors: the type that is computed in, rows without gaps."""

import torch
from torch import Tensor

__all__ = ["computed_type", "unit_stride"]


def computed_type(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def unit_stride(x: Tensor) -> Tensor:
    """`x` with neighbouring values along its last dimension: itself, or a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()

"""Rows of unit length."""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["unit_rows"]


def unit_rows(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """x / max(‖x‖, 1e-12) of rows [N, D], computed in float32 at least and rounded to `dtype`, that of x by default."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1).to(dtype or x.dtype)

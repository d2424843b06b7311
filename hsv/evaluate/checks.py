"""What the evaluations accept as features and labels."""

import torch
from torch import Tensor

__all__ = ["check_features", "check_labelled"]


def check_features(x: Tensor, name: str) -> Tensor:
    """x [n, D] as float32; ValueError for another shape, no rows, or values that are not finite."""
    x = torch.as_tensor(x).detach().float()
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"{name}: got shape {list(x.shape)}; allowed: features [n, D] with n ≥ 1, D ≥ 1")
    if not torch.isfinite(x).all():
        bad = int((~torch.isfinite(x)).any(1).sum())
        raise ValueError(f"{name}: got NaN or infinity in {bad} of {len(x)} rows; allowed: finite features")
    return x


def check_labelled(x: Tensor, y: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Features as `check_features`, and one integer label per row as int64 on the same device."""
    x, y = check_features(x, name), torch.as_tensor(y)
    if y.shape != x.shape[:1] or y.is_floating_point():
        raise ValueError(f"{name}: got labels {list(y.shape)} of {y.dtype}; allowed: integers [{len(x)}]")
    return x, y.to(x.device, torch.int64)

"""The moving average of a teacher's logits."""

import torch
from torch import Tensor

__all__ = ["moved"]


@torch.no_grad()
def moved(centre: Tensor, mean: Tensor, momentum: float) -> Tensor:
    """momentum · centre + (1 − momentum) · mean, of the shape of `centre`, from the mean [K] of a batch.

    A new tensor: the backward that follows may read the old one.
    """
    return (centre * momentum + mean * (1 - momentum)).to(centre.dtype)

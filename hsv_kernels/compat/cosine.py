"""The mean negative cosine along any dimension, for whatever torch takes."""

import torch
import torch.nn.functional as F
from torch import Tensor

from hsv_kernels.compat.inference import recordable
from hsv_kernels.functional import negative_cosine

__all__ = ["mean_negative_cosine"]


def mean_negative_cosine(x0: Tensor, x1: Tensor, dim: int, eps: float) -> Tensor:
    """−mean of F.cosine_similarity(x0, x1, dim, eps), with its errors."""
    dtype = torch.promote_types(x0.dtype, x1.dtype)
    usual = torch.finfo(torch.float32).tiny <= eps < torch.inf and dtype.is_floating_point
    if not (usual and x0.numel() and x1.numel()):  # what the operation does not take
        return -F.cosine_similarity(x0, x1, dim, eps).mean()
    rows = (recordable(x).to(dtype).movedim(dim, -1) for x in torch.broadcast_tensors(x0, x1))
    x0, x1 = (x.reshape(-1, x.shape[-1]) for x in rows)
    return negative_cosine(x0, x1, eps=eps)

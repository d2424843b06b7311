"""The masked mean squared error through hsv_kernels._C."""

import torch
from torch import Tensor

from hsv_kernels.backends import compiled_module
from hsv_kernels.ops.cpu_utils import threads
from hsv_kernels.ops.tensors import dtype_code, unit_stride

__all__ = ["backward", "forward"]


def forward(
    pred: Tensor, images: Tensor, mask: Tensor, p: int, q: int, norm_pix: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, means and reciprocal deviations [B, L]; `mask` contiguous, of the type that is computed in."""
    losses, mean, rstd = (torch.empty_like(mask) for _ in range(3))
    pred = unit_stride(pred)
    compiled_module().reconstruction_forward(
        *_inputs(pred, images, mask, p, q),
        norm_pix,
        *(tensor.data_ptr() for tensor in (losses, mean, rstd)),
        threads(),
    )
    return losses, mean, rstd


def backward(
    weights: Tensor, pred: Tensor, images: Tensor, mask: Tensor, mean: Tensor, rstd: Tensor, p: int, q: int
) -> Tensor:
    """weights · (pred − target), [B, L, p·q·C] in the type of `pred`, 0 where mask is 0."""
    pred = unit_stride(pred)
    gradient = torch.empty(pred.shape, dtype=pred.dtype)
    compiled_module().reconstruction_backward(
        *_inputs(pred, images, mask, p, q),
        *(tensor.data_ptr() for tensor in (weights, mean, rstd, gradient)),
        threads(),
    )
    return gradient


def _inputs(pred: Tensor, images: Tensor, mask: Tensor, p: int, q: int) -> tuple:
    return (
        *(pred.data_ptr(), dtype_code(pred), pred.stride()[:2]),
        *(images.data_ptr(), dtype_code(images), tuple(images.shape), images.stride()),
        *(p, q, mask.data_ptr()),
    )

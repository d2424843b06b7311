"""The masked mean squared error on CUDA tensors, through hsv_kernels._C."""

from typing import Any

import torch
from torch import Tensor

from hsv_kernels.backends import compiled_module
from hsv_kernels.ops.cuda_utils import stream_of
from hsv_kernels.ops.patches import patch_strides
from hsv_kernels.ops.tensors import dtype_code

__all__ = ["backward", "forward"]


def forward(
    pred: Tensor, images: Tensor, mask: Tensor, p: int, q: int, norm_pix: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, means and reciprocal deviations [B, L]; `mask` contiguous float32."""
    images = _readable(images, pred)
    losses, mean, rstd = (torch.empty_like(mask) for _ in range(3))
    compiled_module().cuda_reconstruction_forward(
        *(*stream_of(pred), _problem(pred, images, mask, p, q), norm_pix),
        *(tensor.data_ptr() for tensor in (losses, mean, rstd)),
    )
    return losses, mean, rstd


def backward(
    weights: Tensor, pred: Tensor, images: Tensor, mask: Tensor, mean: Tensor, rstd: Tensor, p: int, q: int
) -> Tensor:
    """weights · (pred − target), [B, L, p·q·C] in the type of `pred`, 0 where mask is 0."""
    images = _readable(images, pred)
    gradient = pred.new_empty(pred.shape)
    compiled_module().cuda_reconstruction_backward(
        *(*stream_of(pred), _problem(pred, images, mask, p, q)),
        *(tensor.data_ptr() for tensor in (weights, mean, rstd, gradient)),
    )
    return gradient


def _readable(images: Tensor, pred: Tensor) -> Tensor:
    """The images in the type of the predictions or in float32, which are those that the kernels read."""
    return images if images.dtype in (pred.dtype, torch.float32) else images.float()


def _problem(pred: Tensor, images: Tensor, mask: Tensor, p: int, q: int) -> Any:
    return compiled_module().CudaReconstructionProblem(
        pred=pred.data_ptr(),
        pred_dtype=dtype_code(pred),
        pred_strides=pred.stride(),
        images=images.data_ptr(),
        images_dtype=dtype_code(images),
        strides=patch_strides(images, p, q),
        shape=(p, q, images.shape[1]),
        mask=mask.data_ptr(),
        B=pred.shape[0],
        L=pred.shape[1],
    )

"""The definition of the masked mean squared error in plain PyTorch."""

import torch
from torch import Tensor

from hsv_kernels.ops.masking.reference import patchify
from hsv_kernels.ops.tensors import computed_type

__all__ = ["EPS", "backward", "denormalise_patches", "forward", "masked_mse", "reduce"]

EPS = 1e-6


def masked_mse(pred: Tensor, images: Tensor, mask: Tensor, p: int, q: int, norm_pix: bool, reduction: str) -> Tensor:
    """Σ mask · mean_pixels (pred − target)² / Σ mask, or its numerator, or its terms [B, L]."""
    losses, _, _ = forward(pred, images, mask.to(computed_type(pred.dtype)), p, q, norm_pix)
    return reduce(losses, mask, reduction)


def forward(
    pred: Tensor, images: Tensor, mask: Tensor, p: int, q: int, norm_pix: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted losses, means and reciprocal deviations [B, L] in the type of `mask`."""
    patches = patchify(images.to(mask.dtype), p, q)
    mean, rstd = patch_statistics(patches, norm_pix)
    errors = (pred.to(mask.dtype) - (patches - mean) * rstd).square().mean(-1)
    # masked_fill and not a product alone: an infinite or NaN prediction of a visible patch does not count
    return errors.masked_fill(mask == 0, 0) * mask, mean.squeeze(-1), rstd.squeeze(-1)


def backward(
    weights: Tensor, pred: Tensor, images: Tensor, mask: Tensor, mean: Tensor, rstd: Tensor, p: int, q: int
) -> Tensor:
    """weights · (pred − target) in the type of `pred`, 0 where mask is 0."""
    target = (patchify(images.to(mask.dtype), p, q) - mean[..., None]) * rstd[..., None]
    gradient = (pred.to(mask.dtype) - target) * weights[..., None]
    return gradient.masked_fill((mask == 0)[..., None], 0).to(pred.dtype)


def reduce(losses: Tensor, mask: Tensor, reduction: str) -> Tensor:
    """Losses [B, L] as they are, their sum, or their sum over Σ mask (0 where that is 0)."""
    if reduction == "none":
        return losses
    if reduction == "sum":
        return _total(losses)
    count = _total(mask.to(losses.dtype))
    return _total(losses) / count.where(count != 0, 1)


def _total(x: Tensor) -> Tensor:
    # Row by row: the order of one sum over everything depends on the number of threads.
    return x.sum(1).sum(0)


def patch_statistics(patches: Tensor, norm_pix: bool) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(unbiased variance + 1e-6) of each patch, [B, L, 1]; 0 and 1 without norm_pix."""
    if not norm_pix:
        ones = patches.new_ones(*patches.shape[:2], 1)
        return torch.zeros_like(ones), ones
    return patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True) + EPS).rsqrt()


def denormalise_patches(pred: Tensor, images: Tensor, p: int, q: int, norm_pix: bool) -> Tensor:
    """[B, L, p·q·C] → [B, C, H, W], with each patch's own mean and deviation."""
    patches = pred.to(torch.promote_types(pred.dtype, torch.float32))
    if norm_pix:
        mean, rstd = patch_statistics(patchify(images.to(patches.dtype), p, q), norm_pix)
        patches = patches / rstd + mean
    B, C, H, W = images.shape
    grid = patches.reshape(B, H // p, W // q, p, q, C)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(B, C, H, W).to(pred.dtype)

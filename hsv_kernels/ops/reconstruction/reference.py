"""The definition of the masked mean squared error in plain PyTorch."""

import torch
from torch import Tensor

from hsv_kernels.ops.masking.reference import patchify

EPS = 1e-6


def masked_mse(pred: Tensor, images: Tensor, mask: Tensor, p: int, q: int, norm_pix: bool, reduction: str) -> Tensor:
    """Σ mask · mean_pixels (pred − target)² / Σ mask, or its numerator, or its terms [B, L]."""
    dtype = torch.float64 if pred.dtype == torch.float64 else torch.float32
    target = patchify(images.to(dtype), p, q)
    if norm_pix:
        mean, std = patch_statistics(target)
        target = (target - mean) / std
    mask = mask.to(dtype)
    # masked_fill and not a product: an infinite or NaN prediction of a visible patch does not count
    losses = (pred.to(dtype) - target).square().mean(-1).masked_fill(mask == 0, 0) * mask
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    count = mask.sum()
    return losses.sum() / count.where(count != 0, 1)


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and sqrt(unbiased variance + 1e-6) of each patch, [B, L, 1]."""
    return patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True) + EPS).sqrt()


def denormalise_patches(pred: Tensor, images: Tensor, p: int, q: int, norm_pix: bool) -> Tensor:
    """[B, L, p·q·C] → [B, C, H, W], with each patch's own mean and deviation."""
    patches = pred.to(torch.promote_types(pred.dtype, torch.float32))
    if norm_pix:
        mean, std = patch_statistics(patchify(images.to(patches.dtype), p, q))
        patches = patches * std + mean
    B, C, H, W = images.shape
    grid = patches.reshape(B, H // p, W // q, p, q, C)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(B, C, H, W).to(pred.dtype)

"""The methods of MAE's MaskedAutoencoderViT that the loss and the masking are made of, as functions and as a mixin.

import models_mae
from hsv_kernels.compat.mae import MaskedAutoencoderMixin

class MaskedAutoencoderViT(MaskedAutoencoderMixin, models_mae.MaskedAutoencoderViT): ...

Its encoder and decoder, parameters and state dicts stay what they are. To have the factories of models_mae build it:
models_mae.MaskedAutoencoderViT = MaskedAutoencoderViT.
"""

import torch
from torch import Tensor

from hsv_kernels import functional
from hsv_kernels.compat.inference import recordable
from hsv_kernels.compat.patches import folded
from hsv_kernels.compat.shapes import broadcast
from hsv_kernels.functional import gather_tokens, masked_mse
from hsv_kernels.ops.masking import reference as masking

__all__ = ["MaskedAutoencoderMixin", "forward_loss", "patchify", "random_masking", "unpatchify"]


def patchify(imgs: Tensor, patch_size: int = 16) -> Tensor:
    """[N, C, H, W] → [N, L, p·p·C]: rows of the grid, then pixels, the channel last.

    Raises:
        AssertionError: a patch that does not divide height and width.
    """
    _check_patch(imgs, patch_size)
    return masking.patchify(imgs, patch_size, patch_size)


def unpatchify(x: Tensor, patch_size: int = 16) -> Tensor:
    """[N, L, p·p·C] → [N, C, H, W], a square image.

    Raises:
        AssertionError: patches that make no square.
    """
    side = round(x.shape[1] ** 0.5)
    if side * side != x.shape[1]:
        raise AssertionError(f"x must hold the patches of a square image; got {x.shape[1]} of them")
    return folded(x, patch_size, side, side, x.shape[2] // patch_size**2)


def random_masking(x: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
    """Keeps int(L · (1 − mask_ratio)) tokens of each sequence, at random by torch's generator, in their order.

    Args:
        x: [N, L, D] of any dtype.
        mask_ratio: share that is removed; out of 0 … 1 as many stay as a slice to int(L · (1 − mask_ratio)) takes.

    Returns:
        x_masked [N, K, D]; mask [N, L] float32, 1 = removed; ids_restore [N, L] int64, the place of each token in
        [kept, removed].
    """
    N, L, _ = x.shape
    keep = len(range(L)[: int(L * (1 - mask_ratio))])
    if not keep:
        ids = torch.arange(L, device=x.device).expand(N, -1)
        return x[:, :0], torch.ones(N, L, device=x.device), ids.contiguous()
    ids_keep, ids_restore, mask = functional.random_masking(N, L, num_keep=keep, device=x.device)
    take = gather_tokens if x.is_floating_point() else masking.gather_tokens
    return take(x, ids_keep), mask, ids_restore


def forward_loss(imgs: Tensor, pred: Tensor, mask: Tensor, patch_size: int = 16, norm_pix_loss: bool = False) -> Tensor:
    """Mean squared error on removed patches.

    Args:
        imgs: [N, C, H, W], which get no gradient; of any real dtype, or a floating one with norm_pix_loss.
        pred: [N, L, p·p·C], or what broadcasts to it.
        mask: [N, L], 1 = removed, or what broadcasts to it: the sum over all N is then over the mask's own sum.
        patch_size: p in pixels.
        norm_pix_loss: targets are patches normalised by their own mean and unbiased variance + 1e-6.

    Returns:
        The mean over removed patches; 0 where nothing is removed.

    Raises:
        AssertionError: a patch that does not divide height and width.
        RuntimeError: predictions or a mask of another shape, integer images with norm_pix_loss.
    """
    _check_patch(imgs, patch_size)
    patches = imgs.shape[2] // patch_size * (imgs.shape[3] // patch_size)
    pred = broadcast("pred", pred, (len(imgs), patches, patch_size**2 * imgs.shape[1]))
    every = broadcast("mask", recordable(mask.detach()), pred.shape[:2])
    if not imgs.is_floating_point():
        if norm_pix_loss:
            raise RuntimeError(f"imgs must be floating with norm_pix_loss; got {imgs.dtype}")
        imgs = imgs.to(pred.dtype)
    loss = masked_mse(pred, recordable(imgs.detach()), every, patch_size, norm_pix=norm_pix_loss)
    return loss * (every.numel() // mask.numel())


def _check_patch(imgs: Tensor, patch_size: int) -> None:
    if imgs.shape[2] % patch_size or imgs.shape[3] % patch_size:
        raise AssertionError(f"patch_size must divide height and width, {list(imgs.shape[2:])}; got {patch_size}")


class MaskedAutoencoderMixin:
    """Takes the place of four methods of a model with `patch_embed.patch_size` and `norm_pix_loss`; goes before it."""

    def patchify(self, imgs: Tensor) -> Tensor:
        return patchify(imgs, self.patch_embed.patch_size[0])

    def unpatchify(self, x: Tensor) -> Tensor:
        return unpatchify(x, self.patch_embed.patch_size[0])

    def random_masking(self, x: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
        return random_masking(x, mask_ratio)

    def forward_loss(self, imgs: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        return forward_loss(imgs, pred, mask, self.patch_embed.patch_size[0], self.norm_pix_loss)

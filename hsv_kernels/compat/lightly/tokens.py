"""lightly.models.utils: tokens drawn, taken, put back and masked."""

import torch
from torch import Tensor

from hsv_kernels.compat.patches import folded
from hsv_kernels.functional import random_masking
from hsv_kernels.ops.masking import reference as masking

__all__ = [
    "expand_index_like",
    "get_at_index",
    "mask_at_index",
    "mask_bool",
    "patchify",
    "prepend_class_token",
    "random_token_mask",
    "repeat_token",
    "set_at_index",
    "unpatchify",
]


def random_token_mask(
    size: tuple[int, int],
    mask_ratio: float = 0.6,
    mask_class_token: bool = False,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """(idx_keep, idx_mask), which part the tokens of each sequence at random; both ascend.

    Args:
        size: (batch, tokens), the class token counted and at index 0.
        mask_ratio: share that is masked, of the tokens that may be.
        mask_class_token: False keeps index 0.
        device: of the indices; None is torch's default.
    """
    batch, tokens = size
    first = 0 if mask_class_token else min(1, tokens)
    length = tokens - first
    keep = min(length, max(0, int((tokens - (not mask_class_token)) * (1 - mask_ratio))))
    order = torch.arange(length, device=device).expand(batch, -1)
    device = order.device
    if batch and 0 < keep < length:
        _, ids_restore, _ = random_masking(batch, length, num_keep=keep, device=device)
        order = torch.empty_like(ids_restore).scatter_(1, ids_restore, order)
    keep_first = torch.zeros(batch, first, dtype=torch.int64, device=device)
    return torch.cat([keep_first, order[:, :keep] + first], dim=1), order[:, keep:] + first


def repeat_token(token: Tensor, size: tuple[int, int]) -> Tensor:
    """[1, 1, D] → [B, L, D] for size (B, L)."""
    batch, tokens = size
    return token.repeat(batch, tokens, 1)


def expand_index_like(index: Tensor, tokens: Tensor) -> Tensor:
    """[B, K] → [B, K, D] for tokens [B, L, D], as torch.gather wants it."""
    return index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])


def get_at_index(tokens: Tensor, index: Tensor) -> Tensor:
    """Tokens [B, K, D] of [B, L, D] at [B, K]. An index may come twice, and its gradients add up."""
    return tokens.gather(1, expand_index_like(index, tokens))


def set_at_index(tokens: Tensor, index: Tensor, value: Tensor | float) -> Tensor:
    """A copy of tokens [B, L, D] with [B, K, D], or one number, in the places [B, K]."""
    if isinstance(value, Tensor):
        value = value.to(tokens.dtype)
    return torch.scatter(tokens, 1, expand_index_like(index, tokens), value)


def mask_at_index(tokens: Tensor, index: Tensor, mask_token: Tensor) -> Tensor:
    """A copy of tokens [B, L, D] with the mask token [1, 1, D] in the places [B, K]."""
    mask = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device).scatter(1, index, True)
    return mask_bool(tokens, mask, mask_token)


def mask_bool(tokens: Tensor, mask: Tensor, mask_token: Tensor) -> Tensor:
    """A copy of tokens [B, L, D] with the mask token [1, 1, D] where mask [B, L] is true."""
    return torch.where(mask.bool().unsqueeze(-1), mask_token, tokens)


def prepend_class_token(tokens: Tensor, class_token: Tensor) -> Tensor:
    """[B, L, D] → [B, 1 + L, D] with the class token [1, 1, D] first."""
    return torch.cat([class_token.expand(len(tokens), -1, -1), tokens], dim=1)


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """[B, C, H, W] → [B, L, p·p·C]: rows of the grid, then pixels, the channel last.

    Raises:
        ValueError: images of other than four dimensions.
        AssertionError: a patch that does not divide height and width.
    """
    if images.dim() != 4:
        raise ValueError(f"images must be [B, C, H, W]; got {list(images.shape)}")
    if images.shape[2] % patch_size or images.shape[3] % patch_size:
        raise AssertionError(f"patch_size must divide height and width, {list(images.shape[2:])}; got {patch_size}")
    return masking.patchify(images, patch_size, patch_size)


def unpatchify(patches: Tensor, patch_size: int, channels: int = 3) -> Tensor:
    """[B, L, p·p·C] → [B, C, H, W], a square image.

    Raises:
        AssertionError: patches that make no square.
    """
    side = round(patches.shape[1] ** 0.5)
    if side * side != patches.shape[1]:
        raise AssertionError(f"patches must be those of a square image; got {patches.shape[1]} of them")
    return folded(patches, patch_size, side, side, channels)

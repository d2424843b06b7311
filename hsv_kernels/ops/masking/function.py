"""Masking, gather and restore as custom operators with their gradients."""

import torch
from torch import Tensor

from hsv_kernels.ops.masking import reference


def random_masking(
    batch: int,
    num_patches: int,
    num_keep: int,
    seed: int | Tensor,
    offset: int | Tensor,
    first_index: int,
    device: torch.device,
    *,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return reference.random_masking(batch, num_patches, num_keep, seed, offset, first_index, device)


def gather_patches(images: Tensor, ids_keep: Tensor, p: int, q: int, *, backend: str) -> Tensor:
    return reference.gather_patches(images, ids_keep, p, q)


def gather_tokens(tokens: Tensor, ids_keep: Tensor, *, backend: str) -> Tensor:
    return reference.gather_tokens(tokens, ids_keep)


def restore_tokens(tokens: Tensor, ids_restore: Tensor, mask_token: Tensor, *, backend: str) -> Tensor:
    return reference.restore_tokens(tokens, ids_restore, mask_token)

"""The definition of masking, gather and restore in plain PyTorch."""

import torch
from torch import Tensor

from hsv_kernels.ops.tensors import computed_type

__all__ = [
    "gather_patches",
    "gather_tokens",
    "masked_sum",
    "patchify",
    "philox",
    "random_masking",
    "restore_tokens",
    "scatter_patches",
    "scatter_tokens",
    "visible_tokens",
]

WORD = 0xFFFFFFFF


def philox(key: tuple[Tensor, Tensor], counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """First output word of Philox-4x32-10 (Salmon et al., 2011); 32-bit words in int64 tensors."""
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for _ in range(10):
        high0, low0 = _multiply(c0, 0xD2511F53)
        high1, low1 = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low words of the 64-bit product; int64 wraps around, and the masks take the bits that are wanted."""
    product = a * b
    return (product >> 32) & WORD, product & WORD


def random_masking(
    seed: Tensor, offset: Tensor, batch: int, num_patches: int, num_keep: int, first_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """ids_keep [B, K], ids_restore [B, L], mask [B, L]: the K smallest (key, l) of each image are kept."""
    device = seed.device
    patch = torch.arange(num_patches, device=device).expand(batch, -1)
    image = first_index + torch.arange(batch, device=device)[:, None].expand_as(patch)
    words = (offset & WORD).expand_as(patch), (offset >> 32 & WORD).expand_as(patch)
    keys = philox((seed & WORD, seed >> 32 & WORD), (patch, image, *words))

    removed = keys.argsort(dim=1, stable=True).argsort(dim=1) >= num_keep
    order = removed.long().argsort(dim=1, stable=True)
    return order[:, :num_keep].contiguous(), order.argsort(dim=1), removed.float()


def gather_patches(images: Tensor, ids_keep: Tensor, p: int, q: int) -> Tensor:
    """[B, K, p·q·C] in (p, q, c) order."""
    return gather_tokens(patchify(images, p, q), ids_keep)


def patchify(images: Tensor, p: int, q: int) -> Tensor:
    """[B, C, H, W] → [B, L, p·q·C]: pixel-major, channel last."""
    B, C, H, W = images.shape
    grid = images.reshape(B, C, H // p, p, W // q, q)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(B, (H // p) * (W // q), p * q * C)


def gather_tokens(tokens: Tensor, ids_keep: Tensor) -> Tensor:
    """out[b, k] = tokens[b, ids_keep[b, k]]."""
    return tokens.gather(1, ids_keep[..., None].expand(-1, -1, tokens.shape[2]))


def restore_tokens(tokens: Tensor, ids_restore: Tensor, mask_token: Tensor) -> Tensor:
    """Visible tokens in their places, the mask token everywhere else."""
    B, K, D = tokens.shape
    fill = mask_token.expand(B, ids_restore.shape[1] - K, D)
    return gather_tokens(torch.cat([tokens, fill], dim=1), ids_restore)


def scatter_patches(grad: Tensor, ids_keep: Tensor, C: int, H: int, W: int, p: int, q: int) -> Tensor:
    """Adjoint of `gather_patches`: [B, C, H, W], zero outside the chosen patches."""
    tokens = scatter_tokens(grad, ids_keep, (H // p) * (W // q))
    grid = tokens.reshape(-1, H // p, W // q, p, q, C)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(-1, C, H, W).contiguous()


def scatter_tokens(grad: Tensor, ids_keep: Tensor, num_tokens: int) -> Tensor:
    """Adjoint of `gather_tokens`: [B, L, D], zero rows where nothing was taken."""
    B, _, D = grad.shape
    return grad.new_zeros(B, num_tokens, D).scatter_(1, ids_keep[..., None].expand_as(grad), grad)


def visible_tokens(grad: Tensor, ids_restore: Tensor, num_keep: int, dtype: torch.dtype) -> Tensor:
    """Adjoint of `restore_tokens` for the tokens: [B, K, D]."""
    return gather_tokens(grad, ids_restore.argsort(dim=1)[:, :num_keep]).to(dtype)


def masked_sum(grad: Tensor, ids_restore: Tensor, num_keep: int) -> Tensor:
    """Adjoint of `restore_tokens` for the mask token: [D], float32 or, for float64, float64."""
    dtype = computed_type(grad.dtype)
    return grad.masked_fill(ids_restore[..., None] < num_keep, 0).sum((0, 1), dtype=dtype)

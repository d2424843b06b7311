"""Masking on CPU tensors, through the compiled kernels."""

import torch
from torch import Tensor

from hsv_kernels.backends import compiled_module
from hsv_kernels.ops.cpu_utils import threads
from hsv_kernels.ops.patches import Strides, packed_strides, patch_strides
from hsv_kernels.ops.tensors import computed_type, dtype_code

__all__ = [
    "gather_patches",
    "gather_tokens",
    "masked_sum",
    "random_masking",
    "restore_tokens",
    "scatter_patches",
    "scatter_tokens",
    "visible_tokens",
]

WORD64 = 2**64 - 1


def random_masking(
    seed: Tensor, offset: Tensor, batch: int, num_patches: int, num_keep: int, first_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    team = min(threads(), batch)
    ids_keep = torch.empty(batch, num_keep, dtype=torch.int64)
    ids_restore = torch.empty(batch, num_patches, dtype=torch.int64)
    mask = torch.empty(batch, num_patches, dtype=torch.float32)
    keys = torch.empty(team, 2 * num_patches, dtype=torch.int32)
    compiled_module().masking_random_masking(
        *(seed.item() & WORD64, offset.item() & WORD64, first_index),
        *(batch, num_patches, num_keep),
        *(ids_keep.data_ptr(), ids_restore.data_ptr(), mask.data_ptr(), keys.data_ptr(), team),
    )
    return ids_keep, ids_restore, mask


def gather_patches(images: Tensor, ids_keep: Tensor, p: int, q: int) -> Tensor:
    B, C, H, W = images.shape
    L, K = (H // p) * (W // q), ids_keep.shape[1]
    out = images.new_empty(B, K, p * q * C)
    _gather(images, patch_strides(images, p, q), ids_keep, L, L, (p, q, C), out, packed_strides(out, q, C))
    return out


def scatter_patches(grad: Tensor, ids_keep: Tensor, C: int, H: int, W: int, p: int, q: int) -> Tensor:
    out = grad.new_empty(grad.shape[0], C, H, W)
    K, sources = grad.shape[1], _invert(ids_keep, "ids_keep", (H // p) * (W // q), (H // p) * (W // q))
    _gather(grad, packed_strides(grad, q, C), sources, K, K + 1, (p, q, C), out, patch_strides(out, p, q))
    return out


def gather_tokens(tokens: Tensor, ids_keep: Tensor) -> Tensor:
    B, L, D = tokens.shape
    out = tokens.new_empty(B, ids_keep.shape[1], D)
    _gather(tokens, packed_strides(tokens, 1, D), ids_keep, L, L, (1, 1, D), out, packed_strides(out, 1, D))
    return out


def scatter_tokens(grad: Tensor, ids_keep: Tensor, num_tokens: int) -> Tensor:
    B, K, D = grad.shape
    out = grad.new_empty(B, num_tokens, D)
    sources = _invert(ids_keep, "ids_keep", num_tokens, num_tokens)
    _gather(grad, packed_strides(grad, 1, D), sources, K, K + 1, (1, 1, D), out, packed_strides(out, 1, D))
    return out


def restore_tokens(tokens: Tensor, ids_restore: Tensor, mask_token: Tensor) -> Tensor:
    B, K, D = tokens.shape
    L = ids_restore.shape[1]
    dtype = torch.promote_types(tokens.dtype, mask_token.dtype)
    tokens, fill = tokens.to(dtype), mask_token.to(dtype).contiguous()
    out = tokens.new_empty(B, L, D)
    strides = packed_strides(tokens, 1, D), packed_strides(out, 1, D)
    _gather(tokens, strides[0], ids_restore, K, L, (1, 1, D), out, strides[1], fill=fill, name="ids_restore")
    return out


def visible_tokens(grad: Tensor, ids_restore: Tensor, num_keep: int, dtype: torch.dtype) -> Tensor:
    B, L, D = grad.shape
    out = grad.new_empty(B, num_keep, D)
    sources = _invert(ids_restore, "ids_restore", num_keep, L)
    strides = packed_strides(grad, 1, D), packed_strides(out, 1, D)
    _gather(grad, strides[0], sources, L, L, (1, 1, D), out, strides[1], name="ids_restore")
    return out.to(dtype)


def masked_sum(grad: Tensor, ids_restore: Tensor, num_keep: int) -> Tensor:
    B, L, D = grad.shape
    dtype = computed_type(grad.dtype)
    total, partial = torch.empty(D, dtype=dtype), torch.empty(128, D, dtype=dtype)
    compiled_module().masking_masked_sum(
        *(dtype_code(grad), grad.data_ptr(), grad.stride(), ids_restore.data_ptr(), *ids_restore.stride()),
        *(B, L, num_keep, D, partial.data_ptr(), total.data_ptr(), threads()),
    )
    return total


def _invert(ids: Tensor, name: str, size: int, limit: int) -> Tensor:
    """[B, size]: the column of `ids` that holds each number, ids.shape[1] where none does."""
    B, N = ids.shape
    table = torch.empty(B, size, dtype=torch.int64)
    call = (ids.data_ptr(), *ids.stride(), B, N, size, limit, table.data_ptr(), threads())
    if not compiled_module().masking_invert(*call):
        raise ValueError(f"{name} must lie in [0, {limit}) and hold no number twice in a row")
    return table


def _gather(
    source: Tensor,
    source_strides: Strides,
    ids: Tensor,
    count: int,
    limit: int,
    shape: tuple[int, int, int],
    out: Tensor,
    out_strides: Strides,
    *,
    fill: Tensor | None = None,
    name: str = "ids_keep",
) -> None:
    """Row n of out[b] is row ids[b, n] of source[b] below `count`, `fill` or zeros from there to `limit`."""
    right = compiled_module().masking_gather(
        *(source.element_size(), source.data_ptr(), source_strides, 0 if fill is None else fill.data_ptr()),
        *(ids.data_ptr(), *ids.stride(), *ids.shape, count, limit),
        *(shape, out.data_ptr(), out_strides, threads()),
    )
    if not right:
        raise ValueError(f"{name} must lie in [0, {limit}) and, for ids_restore, be a permutation")

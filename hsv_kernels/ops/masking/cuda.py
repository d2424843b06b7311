"""Masking on CUDA tensors, through the compiled kernels."""

import torch
from torch import Tensor

from hsv_kernels.backends import compiled_module
from hsv_kernels.ops.cuda_utils import stream_of
from hsv_kernels.ops.patches import Strides, packed_strides, patch_strides
from hsv_kernels.ops.tensors import dtype_code

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


def random_masking(
    seed: Tensor, offset: Tensor, batch: int, num_patches: int, num_keep: int, first_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    ids_keep, ids_restore = seed.new_empty(batch, num_keep), seed.new_empty(batch, num_patches)
    mask = seed.new_empty(batch, num_patches, dtype=torch.float32)
    compiled_module().cuda_masking_random_masking(
        *(*stream_of(seed), seed.data_ptr(), offset.data_ptr(), first_index, batch, num_patches, num_keep),
        *(ids_keep.data_ptr(), ids_restore.data_ptr(), mask.data_ptr()),
    )
    return ids_keep, ids_restore, mask


def gather_patches(images: Tensor, ids_keep: Tensor, p: int, q: int) -> Tensor:
    _, C, H, W = images.shape
    out = images.new_empty(*ids_keep.shape, p * q * C)
    _gather(images, patch_strides(images, p, q), ids_keep, (H // p) * (W // q), (p, q, C), out)
    return out


def scatter_patches(grad: Tensor, ids_keep: Tensor, C: int, H: int, W: int, p: int, q: int) -> Tensor:
    out = grad.new_empty(grad.shape[0], C, H, W)
    _scatter(grad, ids_keep, (H // p) * (W // q), (p, q, C), out, patch_strides(out, p, q))
    return out


def gather_tokens(tokens: Tensor, ids_keep: Tensor) -> Tensor:
    _, L, D = tokens.shape
    out = tokens.new_empty(*ids_keep.shape, D)
    _gather(tokens, packed_strides(tokens, 1, D), ids_keep, L, (1, 1, D), out)
    return out


def scatter_tokens(grad: Tensor, ids_keep: Tensor, num_tokens: int) -> Tensor:
    B, _, D = grad.shape
    out = grad.new_empty(B, num_tokens, D)
    _scatter(grad, ids_keep, num_tokens, (1, 1, D), out, packed_strides(out, 1, D))
    return out


def restore_tokens(tokens: Tensor, ids_restore: Tensor, mask_token: Tensor) -> Tensor:
    B, K, D = tokens.shape
    dtype = torch.promote_types(tokens.dtype, mask_token.dtype)
    tokens, fill = tokens.to(dtype), mask_token.to(dtype).contiguous()
    out = tokens.new_empty(B, ids_restore.shape[1], D)
    _gather(tokens, packed_strides(tokens, 1, D), ids_restore, K, (1, 1, D), out, fill)
    return out


def visible_tokens(grad: Tensor, ids_restore: Tensor, num_keep: int, dtype: torch.dtype) -> Tensor:
    return scatter_tokens(grad, ids_restore, num_keep).to(dtype)


def masked_sum(grad: Tensor, ids_restore: Tensor, num_keep: int) -> Tensor:
    B, L, D = grad.shape
    partial = grad.new_empty(B, D, dtype=torch.float32)
    compiled_module().cuda_masking_masked_sum(
        *(*stream_of(grad), dtype_code(grad), grad.data_ptr(), grad.stride()),
        *(ids_restore.data_ptr(), *ids_restore.stride(), B, L, num_keep, D, partial.data_ptr()),
    )
    return partial.sum(0)


def _gather(
    source: Tensor,
    strides: Strides,
    ids: Tensor,
    count: int,
    shape: tuple[int, int, int],
    out: Tensor,
    fill: Tensor | None = None,
) -> None:
    """Row n of out[b] is patch ids[b, n] of source[b] below `count` and `fill` elsewhere."""
    compiled_module().cuda_masking_gather(
        *(
            *stream_of(source),
            source.element_size(),
            source.data_ptr(),
            strides,
            0 if fill is None else fill.data_ptr(),
        ),
        *(ids.data_ptr(), *ids.stride(), *ids.shape, count, shape, out.data_ptr()),
    )


def _scatter(
    grad: Tensor, ids: Tensor, num_patches: int, shape: tuple[int, int, int], out: Tensor, strides: Strides
) -> None:
    """Patch l of out[b] is row n of grad[b] where ids[b, n] = l, zeros where there is none."""
    compiled_module().cuda_masking_scatter(
        *(*stream_of(grad), grad.element_size(), grad.data_ptr(), grad.stride()),
        *(ids.data_ptr(), *ids.stride(), *ids.shape, num_patches, shape, out.data_ptr(), strides),
    )

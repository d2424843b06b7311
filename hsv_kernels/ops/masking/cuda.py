"""Masking on CUDA tensors, through the compiled kernels."""

import torch
from torch import Tensor

from hsv_kernels.backends import BackendError, compiled_module
from hsv_kernels.ops.masking.cpu import packed_strides, patch_strides


def random_masking(
    seed: Tensor, offset: Tensor, batch: int, num_patches: int, num_keep: int, first_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    ids_keep, ids_restore = seed.new_empty(batch, num_keep), seed.new_empty(batch, num_patches)
    mask = seed.new_empty(batch, num_patches, dtype=torch.float32)
    compiled_module().cuda_random_masking(
        *(*queue(seed), seed.data_ptr(), offset.data_ptr(), first_index, batch, num_patches, num_keep),
        *(ids_keep.data_ptr(), ids_restore.data_ptr(), mask.data_ptr()),
    )
    return ids_keep, ids_restore, mask


def gather_patches(images: Tensor, ids_keep: Tensor, p: int, q: int) -> Tensor:
    C = images.shape[1]
    out = images.new_empty(*ids_keep.shape, p * q * C)
    _gather(images, patch_strides(images, p, q), ids_keep, (p, q, C), out)
    return out


def scatter_patches(grad: Tensor, ids_keep: Tensor, C: int, H: int, W: int, p: int, q: int) -> Tensor:
    out = grad.new_empty(grad.shape[0], C, H, W)
    _scatter(grad, ids_keep, (H // p) * (W // q), (p, q, C), out, patch_strides(out, p, q))
    return out


def gather_tokens(tokens: Tensor, ids_keep: Tensor) -> Tensor:
    D = tokens.shape[2]
    out = tokens.new_empty(*ids_keep.shape, D)
    _gather(tokens, packed_strides(tokens, 1, D), ids_keep, (1, 1, D), out)
    return out


def scatter_tokens(grad: Tensor, ids_keep: Tensor, num_tokens: int) -> Tensor:
    B, _, D = grad.shape
    out = grad.new_empty(B, num_tokens, D)
    _scatter(grad, ids_keep, num_tokens, (1, 1, D), out, packed_strides(out, 1, D))
    return out


def restore_tokens(tokens: Tensor, ids_restore: Tensor, mask_token: Tensor) -> Tensor:
    raise BackendError("backend 'cuda' cannot serve restore_tokens: it has reference, cpu and triton")


def queue(tensor: Tensor) -> tuple[int, int]:
    """The tensor's device and the stream that is current there."""
    return tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream


def _gather(source: Tensor, strides: tuple[int, ...], ids: Tensor, shape: tuple[int, int, int], out: Tensor) -> None:
    compiled_module().cuda_gather(
        *(*queue(source), source.element_size(), source.data_ptr(), strides),
        *(ids.data_ptr(), *ids.stride(), *ids.shape, shape, out.data_ptr()),
    )


def _scatter(
    grad: Tensor, ids: Tensor, num_patches: int, shape: tuple[int, int, int], out: Tensor, strides: tuple[int, ...]
) -> None:
    compiled_module().cuda_scatter(
        *(*queue(grad), grad.element_size(), grad.data_ptr(), packed_strides(grad, *shape[1:])),
        *(ids.data_ptr(), *ids.stride(), *ids.shape, num_patches, shape, out.data_ptr(), strides),
    )

"""Shapes and dtypes that do not fit raise what torch's own operations raise in the originals."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["broadcast", "expanded", "one_dtype", "require_matrix", "require_shape"]


def require_shape(name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    """Raise RuntimeError unless `tensor` is of `shape`."""
    if tuple(tensor.shape) != tuple(shape):
        raise RuntimeError(f"{name} must be {list(shape)}; got {list(tensor.shape)}")


def require_matrix(name: str, tensor: Tensor) -> None:
    """Raise RuntimeError unless `tensor` has two dimensions."""
    if tensor.dim() != 2:
        raise RuntimeError(f"{name} must be [N, D]; got {list(tensor.shape)}")


def expanded(name: str, tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """`tensor` with its sizes of 1 repeated to those of `shape`, as in torch.einsum; RuntimeError for other sizes."""
    if tensor.dim() != len(shape) or any(size not in (1, n) for size, n in zip(tensor.shape, shape, strict=True)):
        raise RuntimeError(f"{name} must be {list(shape)}, or 1 in place of a size; got {list(tensor.shape)}")
    return tensor.expand(*shape)


def broadcast(name: str, tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """`tensor` broadcast to `shape`; RuntimeError where it does not."""
    if tensor.dim() < len(shape):
        tensor = tensor[(None,) * (len(shape) - tensor.dim())]
    return expanded(name, tensor, shape)


def one_dtype(name: str, tensor: Tensor, other_name: str, other: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the wider dtype under autocast, where torch.einsum takes them so; elsewhere RuntimeError for two."""
    if tensor.dtype != other.dtype and not torch.is_autocast_enabled(tensor.device.type):
        raise RuntimeError(f"{other_name} must have the dtype of {name}, {tensor.dtype}; got {other.dtype}")
    dtype = torch.promote_types(tensor.dtype, other.dtype)
    return tensor.to(dtype), other.to(dtype)

"""Shapes that do not fit raise what torch's own operations raise in the originals."""

from collections.abc import Sequence

from torch import Tensor

__all__ = ["expanded", "require_shape"]


def require_shape(name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    """Raise RuntimeError unless `tensor` is of `shape`."""
    if tuple(tensor.shape) != tuple(shape):
        raise RuntimeError(f"{name} must be {list(shape)}; got {list(tensor.shape)}")


def expanded(name: str, tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """`tensor` with its sizes of 1 repeated to those of `shape`, as in torch.einsum; RuntimeError for other sizes."""
    if tensor.dim() != len(shape) or any(size not in (1, n) for size, n in zip(tensor.shape, shape, strict=True)):
        raise RuntimeError(f"{name} must be {list(shape)}, or 1 in place of a size; got {list(tensor.shape)}")
    return tensor.expand(*shape)

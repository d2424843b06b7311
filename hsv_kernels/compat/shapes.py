"""Shapes that do not fit raise what torch's own operations raise in the originals."""

from collections.abc import Sequence

from torch import Tensor

__all__ = ["require_shape"]


def require_shape(name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    """Raise RuntimeError unless `tensor` is of `shape`."""
    if tuple(tensor.shape) != tuple(shape):
        raise RuntimeError(f"{name} must be {list(shape)}; got {list(tensor.shape)}")

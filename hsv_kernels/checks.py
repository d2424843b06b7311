"""Input checks shared by the public functions: each error names the argument, what was given and what is allowed."""

import math
from numbers import Integral

import torch
from torch import Tensor

from hsv_kernels.ops.tensors import computed_type

__all__ = [
    "FLOATS",
    "REDUCTIONS",
    "check_choice",
    "check_dot_dtype",
    "check_floating",
    "check_integer",
    "check_rows",
    "check_same",
    "check_scalar",
    "check_shape",
    "patch_grid",
]

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
REDUCTIONS = ("mean", "sum", "none")


def check_floating(name: str, tensor: Tensor) -> None:
    """`tensor` must be a tensor of float32, float64, bfloat16 or float16."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor; got {type(tensor).__name__}")
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{name} must be float32, float64, bfloat16 or float16; got {tensor.dtype}")


def check_shape(name: str, tensor: Tensor, *dims: str) -> None:
    """`tensor` must have the named dimensions, none of them empty."""
    if tensor.dim() != len(dims) or 0 in tensor.shape:
        raise ValueError(f"{name} must be [{', '.join(dims)}] without an empty dimension; got {list(tensor.shape)}")


def check_same(name: str, tensor: Tensor, other_name: str, other: Tensor, *, dtype: bool = True) -> None:
    """`tensor` must share the device and, unless dtype=False, the dtype of `other`."""
    if tensor.device != other.device:
        raise ValueError(f"{name} and {other_name} must be on one device; got {tensor.device} and {other.device}")
    if dtype and tensor.dtype != other.dtype:
        raise ValueError(f"{name} and {other_name} must have one dtype; got {tensor.dtype} and {other.dtype}")


def check_rows(name: str, rows: Tensor, other_name: str, other: Tensor, *, dtype: bool = True) -> None:
    """Both must be [N, D] of one shape and device and, unless dtype=False, of one dtype, and not empty."""
    check_floating(name, rows)
    check_shape(name, rows, "N", "D")
    check_floating(other_name, other)
    if other.shape != rows.shape:
        raise ValueError(f"{other_name} must have the shape of {name}, {list(rows.shape)}; got {list(other.shape)}")
    check_same(other_name, other, name, rows, dtype=dtype)


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """`value` must be one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")


def check_integer(name: str, value: object) -> None:
    """`value` must be an integer; a size that torch.compile traces is one."""
    if isinstance(value, bool) or not isinstance(value, Integral | torch.SymInt):
        raise ValueError(f"{name} must be an integer; got {value!r}")


def check_scalar(name: str, value: float | Tensor, like: Tensor, *, positive: bool) -> None:
    """`value` must be a finite number (positive if asked), or a 0-dim floating tensor on the device of `like`.

    A number must keep these properties in the dtype that `like` is computed in, and its inverse must if it is positive.
    A tensor's value is never read here: that would wait for the device.
    """
    if isinstance(value, Tensor):
        if value.dim() != 0:
            raise ValueError(f"{name} must be a number or a 0-dim tensor; got a tensor of shape {list(value.shape)}")
        check_floating(name, value)
        check_same(name, value, "the embeddings", like, dtype=False)
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} must be a number or a 0-dim tensor; got {value!r}")
    if not -math.inf < value < math.inf or (positive and value <= 0):
        raise ValueError(f"{name} must be {'positive and ' if positive else ''}finite; got {value!r}")
    computed = computed_type(like.dtype)
    least, most = torch.finfo(computed).tiny if positive else -torch.finfo(computed).max, torch.finfo(computed).max
    if not least <= value <= most:
        raise ValueError(f"{name} must be in [{least}, {most}], the range of {computed}; got {value!r}")


def check_dot_dtype(dot_dtype: torch.dtype | None, like: Tensor) -> bool:
    """Whether products are bfloat16: they are for bfloat16 tensors, and for float32 ones if `dot_dtype` asks for it.

    `dot_dtype` must be None, or torch.bfloat16 for tensors of these two dtypes.
    """
    if dot_dtype is None:
        return like.dtype == torch.bfloat16
    if dot_dtype != torch.bfloat16 or like.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(
            f"dot_dtype must be None, or torch.bfloat16 for float32 tensors; got {dot_dtype} for {like.dtype}"
        )
    return True


def patch_grid(images: Tensor, patch_size: int | tuple[int, int]) -> tuple[int, int]:
    """Checks `images` [B, C, H, W] against `patch_size`; returns the patch's height and width in pixels."""
    check_floating("images", images)
    check_shape("images", images, "B", "C", "H", "W")
    sizes = tuple(patch_size) if isinstance(patch_size, tuple | list) else (patch_size, patch_size)
    if len(sizes) != 2:
        raise ValueError(f"patch_size must be one number or (p, q); got {patch_size!r}")
    for size in sizes:
        check_integer("patch_size", size)
    p, q = sizes
    if p < 1 or q < 1 or images.shape[2] % p or images.shape[3] % q:
        raise ValueError(
            f"patch_size must divide the image: height {images.shape[2]} and width {images.shape[3]} by {p} and {q}"
        )
    return p, q

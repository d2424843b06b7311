"""What the kernel tests share: backends of this machine, layouts, poisoned memory, the error rule."""

import ctypes
import importlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hsv_kernels.backends import OPERATIONS, interpreting, why_not


def device_of(backend: str) -> torch.device:
    """Where tensors live that `backend` serves in this process."""
    on_gpu = backend == "cuda" or (backend == "triton" and not interpreting())
    return torch.device("cuda" if on_gpu else "cpu")


def usable_backends(operation: str, *, reference: bool = True) -> list[str]:
    """Backends of `operation` that this process can run; triton alone under its interpreter."""
    if interpreting():
        return ["triton"]
    names = [
        name
        for name in OPERATIONS[operation]
        if why_not(operation, name, device_of(name), torch.float32) is None
        and (device_of(name).type == "cpu" or torch.cuda.is_available())
    ]
    return ["reference", *names] if reference else names


def serves(operation: str, backend: str, dtype: torch.dtype) -> bool:
    """Whether `backend` computes in `dtype`."""
    return why_not(operation, backend, device_of(backend), dtype) is None


def error(x: Tensor, truth: Tensor, scale: float | None = None) -> float:
    """max |x − truth| / scale over the finite truth, scale being max |truth| where it is not given.

    Infinite if x is infinite or NaN elsewhere than truth is.
    """
    x, truth = x.detach().double().cpu(), truth.detach().double().cpu()
    assert x.shape == truth.shape, f"shape {list(x.shape)} for {list(truth.shape)}"
    finite = truth.isfinite()
    if not torch.equal(x[~finite].nan_to_num(), truth[~finite].nan_to_num()) or not x[finite].isfinite().all():
        return float("inf")
    if not finite.any():
        return 0.0
    return (x[finite] - truth[finite]).abs().max().item() / (scale or truth[finite].abs().max().item() or 1.0)


def assert_accurate(
    kernel: Tensor, plain: Tensor, truth: Tensor, dtype: torch.dtype, dim: int, scale: float | None = None
) -> None:
    """error(kernel) ≤ 2 error(plain) + 8 eps(dtype) √dim.

    Args:
        kernel: what a backend gave for inputs of `dtype`.
        plain: the reference on the same rounded inputs in float32; for float64 its error is scaled to that precision.
        truth: the reference on the same rounded inputs in float64.
        dtype: of the inputs.
        dim: length of the sums, D.
        scale: what errors are relative to where the truth is a difference that vanishes; None is max |truth|.
    """
    precision = torch.finfo(dtype).eps
    finer = precision / torch.finfo(plain.dtype).eps if dtype == torch.float64 else 1.0
    bound = 2 * finer * error(plain, truth, scale) + 8 * precision * dim**0.5
    found = error(kernel, truth, scale)
    assert found <= bound, f"error {found:.3g} exceeds {bound:.3g}"


def incoming(losses: Tensor) -> Tensor:
    """A gradient for `losses`, different for each of its elements."""
    return torch.linspace(-1, 2, losses.numel(), dtype=losses.dtype, device=losses.device).reshape(losses.shape)


def _poison(shape: tuple[int, ...], like: Tensor) -> Tensor:
    value = float("nan") if like.is_floating_point() else torch.iinfo(like.dtype).max
    return torch.full(shape, value, dtype=like.dtype, device=like.device)


def transposed(x: Tensor) -> Tensor:
    """The values of `x` with its first two dimensions swapped in memory."""
    return x.transpose(0, 1).contiguous().transpose(0, 1) if x.dim() > 1 else x.clone()


def strided(x: Tensor) -> Tensor:
    """The values of `x` at every second place of each dimension, at an odd offset, NaN (or the largest int) between."""
    buffer = _poison(tuple(2 * size + 3 for size in x.shape), x)
    view = buffer[tuple(slice(3, None, 2) for _ in x.shape)]
    return view.copy_(x)


def sliced(x: Tensor) -> Tensor:
    """The values of `x` as columns of wider rows, unit stride, NaN (or the largest int) around them."""
    buffer = _poison((*x.shape[:-1], x.shape[-1] + 6), x)
    return buffer[..., 5:-1].copy_(x)


#: Memory layouts that every operation accepts: each maps a tensor to one of equal values and other strides.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.clone,
    "transposed": transposed,
    "strided": strided,
    "sliced": sliced,
}


#: Architectures whose tiles the interpreter can try; it has none of its own, and takes the smallest tiles otherwise.
TILED = (80, 86, 90, 100, 120) if interpreting() else ()


def take_tiles_of(architecture: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's contrast kernels run with the tiles of `architecture`, for one test."""
    for name in ("triton_kernels", "triton_table", "triton_rectangle_forward", "triton_rectangle_gradient"):
        module = importlib.import_module(f"hsv_kernels.ops.contrast.{name}")
        monkeypatch.setattr(module, "architecture_of", lambda tensor: architecture)


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """torch.empty and its like hand out NaN (or the largest int), so that what a kernel leaves unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def sanitized() -> bool:
    """Whether a sanitizer runs in this process; Linux."""
    maps = Path("/proc/self/maps")
    return maps.exists() and re.search(r"/lib[at]san", maps.read_text()) is not None


def peak_memory(function: Callable[[], object]) -> int:
    """Bytes by which this process's resident memory rose, at most, during function(); Linux.

    Skips the test under a sanitizer, which keeps memory of its own.
    """
    if sanitized():
        pytest.skip("a sanitizer's memory counts too")
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmHWM")
    function()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    return 1024 * int(re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])

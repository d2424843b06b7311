"""Which backend serves a call: what is there, what was chosen and, for what is absent, why."""

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType
from typing import Literal, get_args

import torch

__all__ = ["Backend", "BackendError", "Report", "backends", "use_backend"]

Backend = Literal["auto", "reference", "cpu", "triton", "cuda"]

#: Which compiled or generated backends an operation has, beside the reference that each has.
OPERATIONS: dict[str, tuple[str, ...]] = {
    "contrast": ("cpu", "triton"),
    "distillation": ("cpu", "triton"),
    "cosine": ("cpu", "triton"),
    "masking": ("cpu", "triton", "cuda"),
    "reconstruction": ("cpu", "triton", "cuda"),
}

_AUTO = {"cpu": "cpu", "cuda": "triton"}
_current: ContextVar[str] = ContextVar("hsv_backend", default="auto")


class BackendError(RuntimeError):
    """The backend that was asked for cannot serve the call; the message says why."""


@functools.cache
def compiled_module() -> ModuleType | str:
    """hsv_kernels._C, or the reason why it is absent."""
    if importlib.util.find_spec("hsv_kernels._C") is None:
        folder = Path(__file__).parent
        return (
            f"hsv_kernels._C is not in {folder}: it was installed with HSV_BUILD=0, or these are the sources and not "
            "what was installed (inside a checkout use pip install -e, or start Python elsewhere)"
        )
    try:
        from hsv_kernels import _C
    except ImportError as error:
        return f"hsv_kernels._C cannot be imported: {error}"
    try:
        _C.cpu_isa()
    except RuntimeError as error:
        return str(error)
    return _C


@functools.cache
def kernels_of(operation: str, backend: str, form: str = "") -> ModuleType:
    """The module in hsv_kernels.ops that serves `operation` on `backend`, or one of the forms that it has there."""
    name = f"{backend}_{form}" if form else {"triton": "triton_kernels"}.get(backend, backend)
    return importlib.import_module(f"hsv_kernels.ops.{operation}.{name}")


@functools.cache
def triton_problem() -> str | None:
    """Why Triton cannot be imported, or None."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    return None


def interpreting() -> bool:
    """True if Triton's interpreter runs the kernels, which then take CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@torch.compiler.assume_constant_result
def why_not(operation: str, backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `backend` cannot serve `operation` on this device and dtype, or None if it can."""
    if backend == "reference":
        return None
    if backend not in OPERATIONS[operation]:
        return f"{operation} has no {backend} backend; it has: reference, {', '.join(OPERATIONS[operation])}"
    if backend in ("cpu", "cuda") and isinstance(compiled_module(), str):
        return compiled_module()
    if backend == "cuda" and not compiled_module().has_cuda:
        return "hsv_kernels._C was built without csrc/cuda: no nvcc was found, or HSV_BUILD_CUDA=0"
    if backend == "triton":
        if problem := triton_problem():
            return problem
        if device.type == "cpu" and not interpreting():
            return "triton runs on CPU tensors only under its interpreter (TRITON_INTERPRET=1)"
    if backend != "cpu" and dtype == torch.float64:
        return f"{backend} does not compute in float64; cpu and reference do"
    wanted = "cpu" if backend == "cpu" or (backend == "triton" and interpreting()) else "cuda"
    if device.type != wanted:
        return f"{backend} serves {wanted} tensors and this one is on {device}"
    return None


@functools.cache
def _warn_once(operation: str, reason: str) -> None:
    warnings.warn(f"hsv_kernels: {operation} runs its reference operation: {reason}", stacklevel=5)


@torch.compiler.assume_constant_result
def _say_reference(operation: str, reason: str) -> None:
    """Warns while torch.compile traces, which cannot trace a warning."""
    _warn_once(operation, reason)


def resolve(operation: str, tensor: torch.Tensor, backend: str | None) -> str:
    """Name of the backend that serves `operation` for this tensor.

    `backend` None means the one of the surrounding `use_backend`, or auto. auto takes cpu for CPU tensors, triton for
    CUDA tensors, and the reference, with one warning, where these cannot serve. Raises ValueError for an unknown name
    and BackendError for one that is named and cannot serve.
    """
    name = _current.get() if backend is None else _check_name(backend)
    if name != "auto":
        if reason := why_not(operation, name, tensor.device, tensor.dtype):
            raise BackendError(f"backend {name!r} cannot serve {operation}: {reason}")
        return name
    name = _AUTO.get(tensor.device.type, "reference")
    reason = why_not(operation, name, tensor.device, tensor.dtype)
    if name == "reference":
        reason = f"no kernels for {tensor.device.type} tensors"
    if reason is None:
        return name
    _say_reference(operation, reason)
    return "reference"


@contextmanager
def use_backend(name: Backend) -> Iterator[None]:
    """Within this context, calls that name no backend use `name`.

    Raises ValueError for a name other than auto, reference, cpu, triton or cuda.
    """
    token = _current.set(_check_name(name))
    try:
        yield
    finally:
        _current.reset(token)


def _check_name(name: str) -> str:
    if name not in get_args(Backend):
        raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}; got {name!r}")
    return name


class Report(dict[str, dict[str, str]]):
    """{operation: {backend: what serves it, or why it is absent}}; prints as a table."""

    def __repr__(self) -> str:
        rows = [(op, name, text) for op, served in self.items() for name, text in served.items()]
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        return "\n".join(f"{op:<{widths[0]}}  {name:<{widths[1]}}  {text}" for op, name, text in rows)


def backends() -> Report:
    """What serves each operation on this machine and, for what is absent, why.

    The cpu entry names the instruction set chosen at load (HSV_CPU_ISA overrides it).
    """
    return Report(
        {
            operation: {name: _describe(operation, name) for name in ("reference", *names)}
            for operation, names in OPERATIONS.items()
        }
    )


def _describe(operation: str, backend: str) -> str:
    on_gpu = backend in ("triton", "cuda") and not (backend == "triton" and interpreting())
    device = torch.device("cuda" if on_gpu else "cpu")
    if reason := why_not(operation, backend, device, torch.float32):
        return f"absent: {reason}"
    if on_gpu and not torch.cuda.is_available():
        return "absent: torch sees no CUDA device"
    match backend:
        case "reference":
            return "plain PyTorch, every device"
        case "cpu":
            return f"C++, {compiled_module().cpu_isa()}"
        case "triton" if interpreting():
            return "Triton's interpreter, CPU tensors"
        case "triton":
            return f"Triton, {torch.cuda.get_device_name()}"
        case _:
            return f"CUDA C++, {torch.cuda.get_device_name()}"

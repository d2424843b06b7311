"""Selection of the kernel tests: one table of cases, run as it is or by one kind of kernels alone.

TRITON_INTERPRET=1 OMP_NUM_THREADS=1 pytest tests/kernels runs Triton's interpreted kernels and nothing else: tests with
a parameter `backend` equal to "triton", less those marked large. HSV_CPU_ISA=<name> pytest tests/kernels runs the
compiled CPU kernels of that instruction set and nothing else: tests with a parameter `backend` equal to "cpu" and those
marked compiled. HSV_TEST_DEVICE=cuda runs what serves CUDA tensors and nothing else: "triton" and "cuda".
"""

import ctypes
import os

import pytest

from hsv_kernels.backends import compiled_module, interpreting

M_MMAP_THRESHOLD = -3  # malloc.h


def pytest_configure() -> None:
    """Blocks of 1 MiB and more are mapped and unmapped one by one, which peak_memory counts on.

    glibc raises that threshold whenever such a block is freed. Later ones then lie in the heap, and where a small block
    has taken the beginning of a freed one, the next large one makes the heap grow.
    """
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 20)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if interpreting():
        chosen, marked = ("triton",), lambda item: False
    elif os.environ.get("HSV_CPU_ISA"):
        if isinstance(reason := compiled_module(), str):
            raise pytest.UsageError(reason)
        chosen, marked = ("cpu",), lambda item: item.get_closest_marker("compiled") is not None
    elif os.environ.get("HSV_TEST_DEVICE") == "cuda":
        chosen, marked = ("triton", "cuda"), lambda item: False
    else:
        return
    kept, left = [], []
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        too_large = interpreting() and item.get_closest_marker("large") is not None
        runs = (parameters.get("backend") in chosen and not too_large) or marked(item)
        (kept if runs else left).append(item)
    config.hook.pytest_deselected(items=left)
    items[:] = kept

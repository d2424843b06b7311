"""Selection of the kernel tests: one table of cases, run as it is or under Triton's interpreter.

TRITON_INTERPRET=1 OMP_NUM_THREADS=1 pytest tests/kernels runs the interpreted kernels and nothing else: tests with a
parameter `backend` equal to "triton", less those marked large.
"""

from collections.abc import Iterator

import pytest
import torch

from hsv_kernels.backends import interpreting


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not interpreting():
        return
    kept, left = [], []
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        runs = parameters.get("backend") == "triton" and item.get_closest_marker("large") is None
        (kept if runs else left).append(item)
    config.hook.pytest_deselected(items=left)
    items[:] = kept


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The tensors here are small, and threads would wait for each other; tests of threading ask for more themselves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

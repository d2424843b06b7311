"""Tests that need a CUDA device; without one all of them are skipped. `make gpu PART=test` runs them."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hsv_kernels.backends import interpreting

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        reason = "torch sees no CUDA device"
    elif interpreting():
        reason = "Triton's interpreter runs the kernels on CPU tensors"
    else:
        return
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def room() -> Iterator[None]:
    """Gives the memory of a test back before the next."""
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

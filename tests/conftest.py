"""Every test begins with one thread."""

from collections.abc import Iterator

import pytest
import torch


def pytest_configure() -> None:
    """The tensors here are small, and threads would wait for each other; tests of threading ask for more themselves."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Brings the number back after a test that changed it."""
    yield
    torch.set_num_threads(1)

"""What the calls into csrc/cpu share."""

import torch

__all__ = ["threads"]


def threads() -> int:
    """Threads that an operation may use: torch's own number."""
    return torch.get_num_threads()

"""What the calls into csrc/cuda share."""

import torch
from torch import Tensor

__all__ = ["queue"]


def queue(tensor: Tensor) -> tuple[int, int]:
    """The tensor's device and the stream that is current there: csrc/cuda/queue.h."""
    return tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream

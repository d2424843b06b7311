"""What the calls into csrc/cuda share."""

import torch
from torch import Tensor

__all__ = ["stream_of"]


def stream_of(tensor: Tensor) -> tuple[int, int]:
    """The tensor's device and the stream that is current there: csrc/cuda/stream.h."""
    return tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream

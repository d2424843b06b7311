"""What the calls into hsv_kernels._C share: pointers and type codes of tensors, the number of threads."""

import torch
from torch import Tensor

__all__ = ["code", "threads"]

#: csrc/cpu/elements.h, enum DType.
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def code(tensor: Tensor) -> int:
    """Number of the tensor's dtype in csrc/cpu/elements.h."""
    return DTYPE_CODES[tensor.dtype]


def threads() -> int:
    """Threads that an operation may use: torch's own number."""
    return torch.get_num_threads()

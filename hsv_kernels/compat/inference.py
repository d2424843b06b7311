"""Tensors that torch.inference_mode made, in a training step."""

import torch
from torch import Tensor

__all__ = ["recordable"]


def recordable(x: Tensor) -> Tensor:
    """x, or a copy where backward could not read it: x is of inference mode, and that is off.

    torch.compile cannot trace the question.
    """
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or not x.is_inference():
        return x
    return x.clone()

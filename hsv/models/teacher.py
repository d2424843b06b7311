"""A momentum copy of a module."""

from __future__ import annotations

import copy

from torch import nn

__all__ = ["teacher_of"]


def teacher_of(student: nn.Module) -> nn.Module:
    """A copy that is equal now, in float32, and that no gradient reaches; `hsv_kernels.update_teacher` moves it."""
    return copy.deepcopy(student).float().requires_grad_(False)

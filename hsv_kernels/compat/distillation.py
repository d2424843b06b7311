"""Self-distillation of logits of several dtypes, and the moving average of a teacher's logits."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from hsv_kernels.compat.inference import recordable
from hsv_kernels.distributed import distillation_loss

__all__ = ["distilled", "moved"]


def distilled(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    student_temperature: float | Tensor,
    teacher_temperature: float | Tensor,
    centre: Tensor,
    **options: object,
) -> tuple[Tensor, Tensor]:
    """`distributed.distillation_loss` in the dtype that all logits promote to; teachers get no gradient.

    A student's temperature that requires a gradient gets one. `centre` is [K] in any shape.
    """
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in (*students, *teachers)))
    students = [x.to(dtype) for x in students]
    if isinstance(student_temperature, Tensor) and student_temperature.requires_grad:
        # The operation differentiates logits alone: those that it is given hold the temperature.
        students, student_temperature = [(x / student_temperature).to(dtype) for x in students], 1.0
    return distillation_loss(
        students,
        [recordable(x.detach()).to(dtype) for x in teachers],
        student_temperature=_constant(student_temperature, students[0]),
        teacher_temperature=_constant(teacher_temperature, students[0]),
        centre=recordable(centre).flatten(),
        **options,
    )


def _constant(value: float | Tensor, like: Tensor) -> float | Tensor:
    """A number, or from a device's tensor of one value, which is not waited for, a 0-dim one without gradient."""
    if isinstance(value, int | float):
        return float(value)
    value = torch.as_tensor(value).detach()
    if value.device.type == "cpu" and not torch.compiler.is_compiling():
        return float(value)
    return (
        recordable(value)
        .reshape(())
        .to(like.device, torch.promote_types(value.dtype, torch.float32), non_blocking=True)
    )


@torch.inference_mode(False)
@torch.no_grad()
def moved(centre: Tensor, mean: Tensor, momentum: float, rows: int) -> Tensor:
    """momentum · centre + (1 − momentum) · mean, of the shape of `centre`, from the mean [K] of a batch.

    As it was without rows on any rank, whose mean is 0; `rows` are this rank's. A new tensor, since the backward that
    follows may read the old one; also in inference mode one to train with.
    """
    new = (centre * momentum + mean * (1 - momentum)).to(centre.dtype)
    return new if rows else torch.where(mean.any(), new, centre)

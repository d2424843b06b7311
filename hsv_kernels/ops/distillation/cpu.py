"""The distillation loss and Sinkhorn–Knopp through hsv_kernels._C."""

from typing import Any

import torch
from torch import Tensor

from hsv_kernels.backends import compiled_module
from hsv_kernels.ops.cpu_utils import threads
from hsv_kernels.ops.distillation.reference import Problem, views
from hsv_kernels.ops.tensors import computed_type, dtype_code, unit_stride

__all__ = ["backward", "column_logsums", "forward"]


def forward(given: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses [N], mean of the teacher's logits [K], and for students and teachers (m, Σ exp((x − m) / τ))."""
    students, teachers, centre = _readable(given.student), _readable(given.teacher), _contiguous(given.centre)
    N, K = students[0].shape
    dtype = computed_type(students[0].dtype)
    losses, mean = torch.empty(N, dtype=dtype), torch.empty(K, dtype=dtype)
    student_sums, teacher_sums = (torch.empty(2, len(x), N, dtype=dtype) for x in (students, teachers))
    compiled_module().distillation_forward(
        _problem(given, students, teachers, centre),
        *(x.data_ptr() for x in (losses, mean, student_sums, teacher_sums)),
    )
    return losses, mean, student_sums, teacher_sums


def backward(
    gradient: Tensor, given: Problem, student_sums: Tensor, teacher_sums: Tensor, wanted: list[bool]
) -> list[Tensor]:
    """Gradients of the wanted among `student`, of their shapes and type and contiguous."""
    students, teachers, centre = _readable(given.student), _readable(given.teacher), _contiguous(given.centre)
    weights = gradient * given.student_scale / (len(given.pairs) // 2)
    saved = (weights, student_sums.contiguous(), teacher_sums.contiguous())
    found = [
        torch.empty(x.shape, dtype=x.dtype) if needed else None for x, needed in zip(given.student, wanted, strict=True)
    ]
    addresses = []
    for x, out in zip(given.student, found, strict=True):
        addresses += [0] * len(views([x])) if out is None else [view.data_ptr() for view in views([out])]
    compiled_module().distillation_backward(
        _problem(given, students, teachers, centre),
        *(x.data_ptr() for x in saved),
        addresses,
    )
    return [out for out in found if out is not None]


def column_logsums(teacher: list[Tensor], scale: Tensor, logsums: Tensor | None) -> Tensor:
    """log Σ_i exp(x_ik − u_i) [K] over all rows of x = teacher · scale; u is 0 or normalises rows of x − logsums."""
    teachers, logsums = _readable(teacher), _contiguous(logsums)
    out = torch.empty(teachers[0].shape[1], dtype=scale.dtype)
    compiled_module().distillation_column_logsums(
        *(dtype_code(teachers[0]), _addresses(teachers), *teachers[0].shape, scale.item()),
        *(0 if logsums is None else logsums.data_ptr(), out.data_ptr(), threads()),
    )
    return out


def _readable(logits: list[Tensor]) -> list[Tensor]:
    """The views, copied where their classes lie apart."""
    return [unit_stride(view) for view in views(logits)]


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _addresses(rows: list[Tensor]) -> list[tuple[int, int]]:
    return [(x.data_ptr(), x.stride(0)) for x in rows]


def _problem(given: Problem, students: list[Tensor], teachers: list[Tensor], centre: Tensor | None) -> Any:
    """`given` for the module: views and centre are `given`'s, readable, and outlive what this returns."""
    return compiled_module().DistillationProblem(
        dtype=dtype_code(students[0]),
        student=_addresses(students),
        teacher=_addresses(teachers),
        rows=students[0].shape[0],
        classes=students[0].shape[1],
        centre=0 if centre is None else centre.data_ptr(),
        student_scale=given.student_scale.item(),
        teacher_scale=given.teacher_scale.item(),
        pairs=given.pairs,
        threads=threads(),
    )

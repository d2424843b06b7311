"""The distillation loss and the Sinkhorn–Knopp centre as custom operators."""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hsv_kernels.backends import kernels_of
from hsv_kernels.ops.distillation.reference import Problem
from hsv_kernels.ops.operators import backward_operator, differentiable, direct
from hsv_kernels.ops.tensors import computed_type, reduce_losses

__all__ = ["count_views", "distillation_loss", "sinkhorn_centre"]


def distillation_loss(
    student: list[Tensor],
    teacher: list[Tensor],
    student_temperature: float | Tensor,
    teacher_temperature: float | Tensor,
    centre: Tensor | None,
    pairs: list[tuple[int, int]],
    weights: Tensor | None,
    reduction: str,
    *,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The loss and the mean of the teacher's logits, for checked inputs and a resolved backend."""
    like = student[0]
    wanted = [torch.is_grad_enabled() and x.requires_grad for x in student]
    losses, teacher_mean, _, _ = _distillation_loss(
        student,
        teacher,
        None if centre is None else centre.to(computed_type(like.dtype)),
        _inverse(student_temperature, like),
        _inverse(teacher_temperature, like),
        [i for pair in pairs for i in pair],
        wanted,
        backend,
    )
    return reduce_losses(losses, reduction, weights), teacher_mean


def sinkhorn_centre(
    teacher: list[Tensor],
    temperature: float | Tensor,
    iterations: int,
    reduce: Callable[[Tensor], Tensor] | None,
    *,
    backend: str,
) -> Tensor:
    """The centre [K], for checked inputs and a resolved backend."""
    scale = _inverse(temperature, teacher[0])
    logsums = None
    for _ in range(iterations):
        logsums = _column_logsums(teacher, scale, logsums, backend)
        if reduce is not None:
            logsums = reduce(logsums)
    return logsums / scale


def count_views(tensors: list[Tensor]) -> int:
    """How many views tensors [N, K] and [S, N, K] hold together."""
    return sum(x.shape[0] if x.dim() == 3 else 1 for x in tensors)


def _inverse(temperature: float | Tensor, like: Tensor) -> Tensor:
    """1 / temperature, 0-dim, of the type that `like` is computed in; NaN for a tensor out of range."""
    dtype = computed_type(like.dtype)
    if not isinstance(temperature, Tensor):
        return torch.full((), 1 / temperature, dtype=dtype, device=like.device)
    value = temperature.detach().to(dtype)
    return value.reciprocal().where((value > 0) & (value < math.inf), math.nan)


@torch.library.custom_op("hsv_kernels::distillation_loss", mutates_args=())
def distillation_loss_op(
    student: list[Tensor],
    teacher: list[Tensor],
    centre: Tensor | None,
    student_scale: Tensor,
    teacher_scale: Tensor,
    pairs: list[int],
    wanted: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses [N], the mean of the teacher's logits [K] and, for backward, sums [2, S, N] and [2, T, N].

    Scales are 1 / temperature. `pairs` alternates teachers and students; `wanted` says which of `student` get a
    gradient. Sums are, of each row of logits x, of teachers less the centre, a number m near the greatest and
    Σ exp((x − m) · scale); the reference keeps m scaled.
    """
    return kernels_of("distillation", backend).forward(
        Problem(student, teacher, centre, student_scale, teacher_scale, pairs)
    )


@distillation_loss_op.register_fake
def _(
    student: list[Tensor],
    teacher: list[Tensor],
    centre: Tensor | None,
    student_scale: Tensor,
    teacher_scale: Tensor,
    pairs: list[int],
    wanted: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    N, K = student[0].shape[-2:]
    new = functools.partial(student[0].new_empty, dtype=computed_type(student[0].dtype))
    return new(N), new(K), new(2, count_views(student), N), new(2, count_views(teacher), N)


@torch.library.custom_op("hsv_kernels::distillation_loss_backward", mutates_args=())
def distillation_loss_backward_op(
    gradient: Tensor,
    student: list[Tensor],
    teacher: list[Tensor],
    centre: Tensor | None,
    student_scale: Tensor,
    teacher_scale: Tensor,
    pairs: list[int],
    student_sums: Tensor,
    teacher_sums: Tensor,
    wanted: list[bool],
    backend: str,
) -> list[Tensor]:
    """Gradients of the wanted among `student`, of their shapes and type and contiguous, for that [N] of the losses."""
    given = Problem(student, teacher, centre, student_scale, teacher_scale, pairs)
    return kernels_of("distillation", backend).backward(
        gradient.contiguous(), given, student_sums, teacher_sums, wanted
    )


@distillation_loss_backward_op.register_fake
def _(
    gradient: Tensor,
    student: list[Tensor],
    teacher: list[Tensor],
    centre: Tensor | None,
    student_scale: Tensor,
    teacher_scale: Tensor,
    pairs: list[int],
    student_sums: Tensor,
    teacher_sums: Tensor,
    wanted: list[bool],
    backend: str,
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x, needed in zip(student, wanted, strict=True) if needed]


@torch.library.custom_op("hsv_kernels::column_logsums", mutates_args=())
def column_logsums_op(teacher: list[Tensor], scale: Tensor, logsums: Tensor | None, backend: str) -> Tensor:
    """One step of Sinkhorn–Knopp, [K]: samples normalised by `logsums` if given, then columns summed, in logs."""
    return kernels_of("distillation", backend).column_logsums(teacher, scale, logsums)


@column_logsums_op.register_fake
def _(teacher: list[Tensor], scale: Tensor, logsums: Tensor | None, backend: str) -> Tensor:
    return scale.new_empty(teacher[0].shape[-1])


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    student, teacher, centre, student_scale, teacher_scale, ctx.pairs, ctx.wanted, ctx.backend = inputs
    _, teacher_mean, student_sums, teacher_sums = output
    ctx.students, ctx.teachers = len(student), len(teacher)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(teacher_mean, student_sums, teacher_sums)
    ctx.save_for_backward(*student, *teacher, centre, student_scale, teacher_scale, student_sums, teacher_sums)


def _backward(ctx: Any, gradient: Tensor | None, *_: None) -> tuple[list[Tensor | None] | None, ...]:
    found = [None] * ctx.students
    if gradient is not None:
        saved = list(ctx.saved_tensors)
        student, teacher = saved[: ctx.students], saved[ctx.students : -5]
        centre, student_scale, teacher_scale, *sums = saved[-5:]
        scales = centre, student_scale, teacher_scale
        args = gradient, student, teacher, *scales, ctx.pairs, *sums, ctx.wanted, ctx.backend
        of_wanted = iter(_distillation_loss_backward(*args))
        found = [next(of_wanted) if needed else None for needed in ctx.wanted]
    return found, [None] * ctx.teachers, *(None,) * 6


_distillation_loss = differentiable(distillation_loss_op, _setup_context, _backward)
_distillation_loss_backward = backward_operator(distillation_loss_backward_op, "distillation_loss")
_column_logsums = direct(column_logsums_op)

"""The definition of the distillation loss, and of Sinkhorn–Knopp as a centre, in plain PyTorch."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hsv_kernels.ops.tensors import computed_type

__all__ = ["Problem", "backward", "column_logsums", "distillation_losses", "forward", "views"]


class Problem(NamedTuple):
    """What the loss is taken of: logits [N, K] and [views, N, K], whose views are numbered in order."""

    student: list[Tensor]
    teacher: list[Tensor]
    centre: Tensor | None  # [K]
    student_scale: Tensor  # 0-dim, 1 / temperature
    teacher_scale: Tensor
    pairs: list[int]  # a teacher, its student, a teacher …


def views(tensors: list[Tensor]) -> list[Tensor]:
    """The views [N, K] of tensors [N, K] and [S, N, K], in order."""
    return [view for tensor in tensors for view in (tensor.unbind() if tensor.dim() == 3 else (tensor,))]


def distillation_losses(given: Problem) -> Tensor:
    """mean over pairs of −Σ_k softmax((t − c) · teacher_scale)_k log_softmax(s · student_scale)_k, [N]."""
    student, teacher, centre, student_scale, teacher_scale, pairs = given
    students, teachers = views(student), views(teacher)
    logs = {s: _scaled(students[s], None, student_scale).log_softmax(-1) for s in pairs[1::2]}
    targets = {t: _scaled(teachers[t], centre, teacher_scale).softmax(-1) for t in pairs[::2]}
    # a target of 0 takes nothing from a log-probability of −inf, and everything from one that is NaN
    terms = (_cross_entropy(targets[t], logs[s]) for t, s in zip(pairs[::2], pairs[1::2], strict=True))
    return sum(terms) / (len(pairs) // 2)


def forward(given: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses [N], mean of the teacher's logits [K], and greatest logits with sums of students and of teachers."""
    teachers, losses = views(given.teacher), distillation_losses(given)
    mean = torch.stack([x.to(losses.dtype).mean(0) for x in teachers]).mean(0)
    student_sums = torch.stack([_sums(_scaled(x, None, given.student_scale)) for x in views(given.student)], 1)
    teacher_sums = torch.stack([_sums(_scaled(x, given.centre, given.teacher_scale)) for x in teachers], 1)
    return losses, mean, student_sums, teacher_sums


def backward(
    gradient: Tensor, given: Problem, student_sums: Tensor, teacher_sums: Tensor, wanted: list[bool]
) -> list[Tensor]:
    """gradient · student_scale / pairs · Σ_t (softmax(s) − q_t) over the teachers t of each student, where wanted."""
    student, teacher, centre, student_scale, teacher_scale, pairs = given
    targets = [
        _softmax(_scaled(x, centre, teacher_scale), sums)
        for x, sums in zip(views(teacher), teacher_sums.unbind(1), strict=True)
    ]
    weight = (gradient * student_scale / (len(pairs) // 2))[:, None]
    found, first = [], 0
    for tensor, needed in zip(student, wanted, strict=True):
        rows = views([tensor])
        if needed:
            of_views = []
            for s, x in enumerate(rows, first):
                paired = [targets[t] for t, other in zip(pairs[::2], pairs[1::2], strict=True) if other == s]
                p = _softmax(_scaled(x, None, student_scale), student_sums[:, s])
                of_views.append(weight * (len(paired) * p - sum(paired)) if paired else torch.zeros_like(p))
            found.append(torch.stack(of_views).view(tensor.shape).to(tensor.dtype))
        first += len(rows)
    return found


def column_logsums(teacher: list[Tensor], scale: Tensor, logsums: Tensor | None) -> Tensor:
    """v [K]: log Σ_i exp(x_ik − u_i) over rows i with x = t · scale; u_i = log Σ_k exp(x_ik − logsums_k), or 0."""
    x = torch.cat([_scaled(view, None, scale) for view in views(teacher)])
    if logsums is not None:
        x = x - (x - logsums).logsumexp(1, keepdim=True)
    return x.logsumexp(0)


def _cross_entropy(q: Tensor, log_p: Tensor) -> Tensor:
    return -(q * log_p).masked_fill((q == 0) & (log_p == -math.inf), 0).sum(-1)


def _sums(x: Tensor) -> Tensor:
    """The greatest of each row of `x` and Σ exp(x − greatest), [2, N]."""
    greatest = x.amax(-1)
    return torch.stack([greatest, (x - greatest[:, None]).exp().sum(-1)])


def _softmax(x: Tensor, sums: Tensor) -> Tensor:
    greatest, total = sums[..., None]
    return (x - greatest).exp() / total


def _scaled(x: Tensor, centre: Tensor | None, scale: Tensor) -> Tensor:
    x = x.to(computed_type(x.dtype))
    return (x if centre is None else x - centre) * scale

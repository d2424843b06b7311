"""The teacher of self-distillation: an exponential moving average of the student."""

from collections import defaultdict
from numbers import Real

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["update_teacher"]


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float | Tensor, *, buffers: bool = True) -> None:
    """Moves the teacher towards the student, in place: θ_t ← momentum · θ_t + (1 − momentum) · θ_s.

    Launches grow with the number of devices and dtypes and not with that of parameters. A parameter that modules share
    is moved once. The student may be of another dtype (a bfloat16 student of a float32 teacher): the average is taken
    in the teacher's, which should be float32, since a step of 1 − momentum is lost in the rounding of half types.
    Buffers, BatchNorm's running statistics for instance, are copied.

    Args:
        teacher, student: modules with parameters and buffers of equal names and shapes, on the same devices; those
            within DistributedDataParallel are meant, a module that torch.compile wraps is passed as its original.
        momentum: in [0, 1], or a 0-dim floating tensor, whose value the host never reads.
        buffers: False leaves the teacher its own, as in MoCo, whose teacher takes statistics of its own batches.

    Raises:
        ValueError: modules that differ, by name; a momentum out of range.
    """
    teacher, student = (x.module if isinstance(x, DistributedDataParallel) else x for x in (teacher, student))
    _check_momentum(momentum)
    moved = _pairs("parameter", _parameters(teacher), _parameters(student))
    copied = _pairs("buffer", _buffers(teacher), _buffers(student)) if buffers else {}
    for (device, dtype, student_dtype), (of_teacher, of_student) in moved.items():
        if student_dtype != dtype:
            converted = [torch.empty_like(x) for x in of_teacher]
            torch._foreach_copy_(converted, of_student)
            of_student = converted
        if not isinstance(momentum, Tensor):
            torch._foreach_lerp_(of_teacher, of_student, 1 - momentum)
            continue
        step = torch._foreach_sub(of_student, of_teacher)
        torch._foreach_mul_(step, (1 - momentum).to(device, dtype))
        torch._foreach_add_(of_teacher, step)
    for of_teacher, of_student in copied.values():
        torch._foreach_copy_(of_teacher, of_student)


Kind = tuple[torch.device, torch.dtype, torch.dtype]


def _parameters(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters(remove_duplicate=False))


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_buffers(remove_duplicate=False))


def _pairs(
    kind: str, of_teacher: dict[str, Tensor], of_student: dict[str, Tensor]
) -> dict[Kind, tuple[list[Tensor], list[Tensor]]]:
    """Tensors of equal names, each of the teacher's once, in lists of one device and one dtype on either side."""
    for name in sorted(of_teacher.keys() ^ of_student.keys()):
        owner, other = ("teacher", "student") if name in of_teacher else ("student", "teacher")
        raise ValueError(
            f"teacher and student must have equal {kind}s; {name!r} is the {owner}'s and not the {other}'s"
        )
    groups: dict[Kind, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
    seen: set[int] = set()
    for name, ours in of_teacher.items():
        theirs = of_student[name]
        if ours.shape != theirs.shape or ours.device != theirs.device:
            raise ValueError(
                f"{kind} {name!r} must have one shape and device in teacher and student; "
                f"got {list(ours.shape)} on {ours.device} and {list(theirs.shape)} on {theirs.device}"
            )
        if id(ours) not in seen:
            seen.add(id(ours))
            to, source = groups[ours.device, ours.dtype, theirs.dtype]
            to.append(ours)
            source.append(theirs)
    return groups


def _check_momentum(momentum: float | Tensor) -> None:
    if isinstance(momentum, Tensor):
        if momentum.dim() != 0 or not momentum.is_floating_point():
            raise ValueError(
                f"momentum must be in [0, 1] or a 0-dim floating tensor; got {momentum.dtype} {list(momentum.shape)}"
            )
    elif isinstance(momentum, bool) or not isinstance(momentum, Real) or not 0 <= momentum <= 1:
        raise ValueError(f"momentum must be in [0, 1] or a 0-dim floating tensor; got {momentum!r}")

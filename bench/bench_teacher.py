"""The teacher's update for the parameters of ViT-S/16, against the loop over parameters."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bench.cases import DEVICE, QUICK, Case, Provider, Work
from bench.providers import Loss, compiled
from hsv_kernels import update_teacher

WIDTH, LAYERS = (16, 2) if QUICK else (384, 12)
MOMENTUM = 0.996


def network(device: str) -> nn.Module:
    return nn.Sequential(*(nn.TransformerEncoderLayer(WIDTH, 1, 4 * WIDTH, device=device) for _ in range(LAYERS)))


PARAMETERS = sum(x.numel() for x in network("meta").parameters())


def moved(teacher: nn.Module) -> Tensor:
    """Something to compare."""
    return next(teacher.parameters()).detach()


def hsv(teacher: nn.Module, student: nn.Module) -> Tensor:
    update_teacher(teacher, student, MOMENTUM)
    return moved(teacher)


def eager(teacher: nn.Module, student: nn.Module) -> Tensor:
    """As in MoCo, BYOL and DINO."""
    for x, y in zip(teacher.parameters(), student.parameters(), strict=True):
        x.mul_(MOMENTUM).add_(y, alpha=1 - MOMENTUM)
    return moved(teacher)


def lightly() -> Loss:
    from lightly.models.utils import update_momentum

    def run(teacher: nn.Module, student: nn.Module) -> Tensor:
        update_momentum(student, teacher, MOMENTUM)
        return moved(teacher)

    return run


def inputs(dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return network(DEVICE).to(dtype), network(DEVICE).to(dtype)


CASES = [
    Case(
        operation="update_teacher",
        shape={"parameters": PARAMETERS},
        products="float32",
        inputs=inputs,
        providers={
            "hsv": Provider(lambda: hsv),
            "eager": Provider(lambda: eager, note="a loop over the parameters"),
            "torch.compile": Provider(compiled(eager)),
            "lightly": Provider(lightly),
        },
        kinds=("forward",),
        work={"forward": Work(bytes=12.0 * PARAMETERS)},
    )
]


def test_speed(case: Case, mode: str, provider: str, record: Callable[[Case, str, str], None]) -> None:
    record(case, mode, provider)

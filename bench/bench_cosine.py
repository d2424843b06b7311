"""Negative cosine of predictions and frozen targets (SimSiam, BYOL), against the same formula in plain PyTorch."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import DEVICE, QUICK, Case, Provider, Work
from bench.providers import Loss, compiled
from hsv_kernels import negative_cosine

SHAPES = [(8, 64)] if QUICK else [(512, 2048), (4096, 256)]  # of SimSiam and of BYOL


def hsv(p: Tensor, z: Tensor) -> Tensor:
    return negative_cosine(p, z)


def eager(p: Tensor, z: Tensor) -> Tensor:
    return -F.cosine_similarity(p, z).mean()


def normalised(p: Tensor, z: Tensor) -> Tensor:
    """BYOL's form."""
    return -(F.normalize(p) * F.normalize(z)).sum(1).mean()


def lightly() -> Loss:
    from lightly.loss import NegativeCosineSimilarity

    return NegativeCosineSimilarity()


def inputs(n: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    p, z = (torch.randn(n, dim, dtype=dtype, device=DEVICE) for _ in range(2))
    return p.requires_grad_(), z


def cosine_case(n: int, dim: int) -> Case:
    """Both tensors are read in either direction; the gradient of one is written."""
    size = 4.0 * n * dim
    return Case(
        operation="negative_cosine",
        shape={"N": n, "D": dim},
        products="float32",
        inputs=partial(inputs, n, dim),
        providers={
            "hsv": Provider(lambda: hsv),
            "eager": Provider(lambda: eager),
            "torch.compile": Provider(compiled(eager)),
            "F.normalize": Provider(lambda: normalised),
            "lightly": Provider(lightly),
        },
        work={"forward": Work(bytes=2 * size), "backward": Work(bytes=3 * size), "both": Work(bytes=5 * size)},
    )


CASES = [cosine_case(n, dim) for n, dim in SHAPES]


def test_speed(case: Case, mode: str, provider: str, record: Callable[[Case, str, str], None]) -> None:
    record(case, mode, provider)

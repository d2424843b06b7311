"""Masked mean squared error with normalised targets, against the same formula in plain PyTorch."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench.cases import DEVICE, QUICK, Case, Provider, Work
from bench.providers import compiled
from hsv_kernels import masked_mse
from hsv_kernels.ops.reconstruction import reference

BATCH = 2 if QUICK else 64
SIDE, PATCH, CHANNELS = 224, 16, 3
L, VALUES = (SIDE // PATCH) ** 2, PATCH * PATCH * CHANNELS
MASKED = L - L // 4


def hsv(pred: Tensor, images: Tensor, mask: Tensor) -> Tensor:
    return masked_mse(pred, images, mask, PATCH)


def eager(pred: Tensor, images: Tensor, mask: Tensor) -> Tensor:
    return reference.masked_mse(pred, images, mask, PATCH, PATCH, True, "mean")


def inputs(batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Predictions, float32 images, and a mask of three patches of four."""
    torch.manual_seed(0)
    pred = torch.randn(batch, L, VALUES, dtype=dtype, device=DEVICE, requires_grad=True)
    images = torch.randn(batch, CHANNELS, SIDE, SIDE, device=DEVICE)
    mask = (torch.rand(batch, L, device=DEVICE).argsort(1) < MASKED).float()
    return pred, images, mask


def reconstruction_work(batch: int, size: int) -> dict[str, Work]:
    """Predictions of `size` bytes and pixels of masked patches are read, twice for both; the gradient is written."""
    read = (size + 4.0) * batch * MASKED * VALUES
    write = 1.0 * size * batch * L * VALUES  # zero where nothing is masked
    return {"forward": Work(bytes=read), "backward": Work(bytes=read + write), "both": Work(bytes=2 * read + write)}


def reconstruction_case() -> Case:
    return Case(
        operation="masked_mse",
        shape={"B": BATCH, "px": SIDE},
        products="float32",
        inputs=partial(inputs, BATCH),
        providers={
            "hsv": Provider(lambda: hsv),
            "eager": Provider(lambda: eager),
            "torch.compile": Provider(compiled(eager)),
        },
        work=reconstruction_work(BATCH, 4),
        seconds=6,
    )


CASES = [reconstruction_case()]


def test_speed(case: Case, mode: str, provider: str, record: Callable[[Case, str, str], None]) -> None:
    record(case, mode, provider)

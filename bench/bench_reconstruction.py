"""Masked mean squared error, forward and backward: the kernels against plain PyTorch, eager and compiled.

python bench/bench_reconstruction.py [--batch 64] [--rounds 15] [--dtype float32] prints medians of interleaved runs;
under pytest --benchmark-only each provider is timed on its own. Huge pages for everyone: THP_MEM_ALLOC_ENABLE=1.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hsv_kernels import masked_mse
from hsv_kernels.ops.reconstruction import reference

SIZE, PATCH = 224, 16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Predictions of `dtype`, float32 images of 224 px, three patches of four masked."""
    torch.manual_seed(0)
    L = (SIZE // PATCH) ** 2
    pred = torch.randn(batch, L, 3 * PATCH**2, dtype=dtype, device=DEVICE, requires_grad=True)
    images = torch.randn(batch, 3, SIZE, SIZE, device=DEVICE)
    mask = (torch.rand(batch, L, device=DEVICE).argsort(1) >= L // 4).float()
    return pred, images, mask


def plain(pred: Tensor, images: Tensor, mask: Tensor) -> Tensor:
    return reference.masked_mse(pred, images, mask, PATCH, PATCH, True, "mean")


def kernel(pred: Tensor, images: Tensor, mask: Tensor) -> Tensor:
    return masked_mse(pred, images, mask, PATCH)


PROVIDERS: dict[str, Callable[..., Tensor]] = {"hsv": kernel, "eager": plain, "compile": torch.compile(plain)}


def step(provider: str, given: tuple[Tensor, Tensor, Tensor]) -> None:
    """Loss and gradient, the gradient freshly allocated as in training."""
    given[0].grad = None
    PROVIDERS[provider](*given).backward()
    if DEVICE == "cuda":
        torch.cuda.synchronize()


@pytest.mark.parametrize("provider", PROVIDERS)
def test_masked_mse(benchmark: Callable, provider: str) -> None:
    benchmark.group = f"masked_mse forward + backward, batch 64, float32, {DEVICE}"
    benchmark.pedantic(step, args=(provider, inputs(64, torch.float32)), rounds=7, warmup_rounds=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=64, help="images")
    parser.add_argument("--rounds", type=int, default=15, help="interleaved runs of each provider")
    parser.add_argument("--dtype", default="float32", help="of the predictions: float32, bfloat16 or float16")
    options = parser.parse_args()
    given = inputs(options.batch, getattr(torch, options.dtype))
    times: dict[str, list[float]] = {name: [] for name in PROVIDERS}
    for name in PROVIDERS:
        step(name, given)
    for _ in range(options.rounds):
        for name, measured in times.items():
            start = time.perf_counter()
            step(name, given)
            measured.append(1e3 * (time.perf_counter() - start))
    own = statistics.median(times["hsv"])
    for name, measured in times.items():
        ratios = [theirs / ours for theirs, ours in zip(measured, times["hsv"], strict=True)]
        print(
            f"{name:8} {statistics.median(measured):8.2f} ms  (least {min(measured):.2f}, most {max(measured):.2f})"
            f"  {statistics.median(ratios):5.1f} × hsv's {own:.2f} ms"
        )


if __name__ == "__main__":
    main()

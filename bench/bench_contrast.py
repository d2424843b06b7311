"""NT-Xent on the CPU, float32, D = 128, τ = 0.1, against eager PyTorch and torch.compile: time and extra memory.

    pytest bench/bench_contrast.py                 # HSV_BENCH_THREADS=2 by default

Providers run in turn within each round, so that another load on the machine falls on all alike; each row gives the
median and the least time and the median ratio of pairs. pytest-benchmark records the fused loss in the same rounds.
"""

import os
import sys
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.common import interleaved, peak_in_child, print_peak, ratio
from hsv_kernels import nt_xent

DIM, TEMPERATURE = 128, 0.1
ROUNDS = {256: 60, 1024: 21, 4096: 7}
THREADS = int(os.environ.get("HSV_BENCH_THREADS", "2"))


def fused(z0: Tensor, z1: Tensor) -> Tensor:
    return nt_xent(z0, z1, TEMPERATURE)


def eager(z0: Tensor, z1: Tensor) -> Tensor:
    """The loss as it is usually written: one cross-entropy over the masked similarity matrix."""
    n = z0.shape[0]
    z = F.normalize(torch.cat([z0, z1]))
    logits = z @ z.T / TEMPERATURE
    logits.fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, torch.arange(2 * n).roll(n))


Loss = Callable[[Tensor, Tensor], Tensor]
PROVIDERS: dict[str, Loss] = {"hsv": fused, "eager": eager, "compile": torch.compile(eager, dynamic=False)}


def step(loss: Loss, z0: Tensor, z1: Tensor, mode: str) -> Tensor:
    if mode == "forward":
        with torch.no_grad():
            return loss(z0, z1)
    value = loss(z0, z1)
    torch.autograd.grad(value, (z0, z1))
    return value


def views(n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    z0, z1 = (torch.randn(n, DIM, generator=generator).requires_grad_() for _ in range(2))
    return z0, z1


@pytest.fixture(autouse=True)
def threads() -> None:
    torch.set_num_threads(THREADS)


@pytest.mark.parametrize("mode", ["forward", "both"])
@pytest.mark.parametrize("n", ROUNDS)
def test_time(n: int, mode: str, record: Callable[[dict[str, object]], None], benchmark: Callable) -> None:
    z0, z1 = views(n)
    steps = {name: partial(step, loss, z0, z1, mode) for name, loss in PROVIDERS.items()}
    assert abs(steps["hsv"]() - steps["eager"]()) <= 1e-5 * steps["eager"]().abs()

    seconds = interleaved(benchmark, steps, ROUNDS[n])
    for name, times in seconds.items():
        record(
            {
                "kernel": "nt_xent",
                "mode": mode,
                "N": n,
                "provider": name,
                "median ms": f"{1e3 * sorted(times)[len(times) // 2]:.2f}",
                "min ms": f"{1e3 * min(times):.2f}",
                "× hsv": f"{ratio(times, seconds['hsv']):.2f}",
            }
        )
    if (n, mode) == (4096, "both"):
        assert ratio(seconds["eager"], seconds["hsv"]) >= 3


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_extra_memory(record: Callable[[dict[str, object]], None]) -> None:
    n = 4096
    extra = {name: peak_in_child("bench.bench_contrast", name, str(n)) for name in PROVIDERS}
    for name, size in extra.items():
        record(
            {
                "kernel": "nt_xent",
                "mode": "both",
                "N": n,
                "provider": name,
                "extra MiB": f"{size / 2**20:.1f}",
                "× hsv": f"{size / extra['hsv']:.1f}",
            }
        )
    assert extra["eager"] >= 30 * extra["hsv"]


if __name__ == "__main__":  # provider N: the child of test_extra_memory
    torch.set_num_threads(THREADS)
    provider, size = PROVIDERS[sys.argv[1]], int(sys.argv[2])
    small, large = views(64), views(size)
    if sys.argv[1] == "compile":  # the compiler itself takes more than the loss
        step(provider, *large, "both")
    print_peak(lambda: step(provider, *large, "both"), lambda: step(provider, *small, "both"))

"""NT-Xent and MoCo's queue, D = 128, τ = 0.1: time, memory and the fraction of the machine's limit.

pytest bench/bench_contrast.py runs it alone; `make bench` runs all benchmarks and writes the results.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import providers as p
from bench.cases import DEVICE, HUGE_PAGES, QUICK, Case, Provider, Work
from hsv_kernels import nt_xent, similarity_logsumexp

DIM = 128
SIZES = [64, 128] if QUICK else [128, 256, 512, 1024, 2048, 4096, *([] if HUGE_PAGES else [8192, 16384, 32768])]
QUEUE = (32, 1024) if QUICK else (256, 65536)
BF16 = torch.bfloat16


def hsv_nt_xent(z0: Tensor, z1: Tensor) -> Tensor:
    return nt_xent(z0, z1, p.TEMPERATURE)


def hsv_nt_xent_bf16_products(z0: Tensor, z1: Tensor) -> Tensor:
    return nt_xent(z0, z1, p.TEMPERATURE, dot_dtype=BF16)


def hsv_queue(q: Tensor, positive: Tensor, queue: Tensor) -> Tensor:
    d, _ = similarity_logsumexp(q, queue, scale=1 / p.TEMPERATURE, positive=positive)
    return F.softplus(d).mean()


NT_XENT = {
    "float32": {
        "hsv": Provider(lambda: hsv_nt_xent),
        "eager": Provider(lambda: p.eager_nt_xent),
        "torch.compile": Provider(p.compiled(p.eager_nt_xent)),
        "lightly": Provider(p.lightly_nt_xent),
        "solo-learn's formula": Provider(p.solo_learn_nt_xent),
        "linear_cross_entropy": Provider(p.chunked_nt_xent, note="column i of row i is taken off afterwards"),
        "pytorch-metric-learning": Provider(p.metric_learning_nt_xent),
    },
    "bfloat16": {
        "hsv": Provider(lambda: hsv_nt_xent, BF16),
        "eager": Provider(lambda: p.autocast(p.eager_nt_xent), BF16, note="autocast"),
        "torch.compile": Provider(p.compiled(p.autocast(p.eager_nt_xent)), BF16, note="autocast"),
        "hsv, float32 inputs": Provider(lambda: hsv_nt_xent_bf16_products, note="dot_dtype=torch.bfloat16"),
    },
}
MOCO = {
    "float32": {
        "hsv": Provider(lambda: hsv_queue),
        "eager": Provider(lambda: p.eager_queue),
        "torch.compile": Provider(p.compiled(p.eager_queue)),
        "linear_cross_entropy": Provider(
            p.chunked_queue, note="the batch's other keys are negatives too", compared=False
        ),
    },
    "bfloat16": {
        "hsv": Provider(lambda: hsv_queue, BF16),
        "eager": Provider(lambda: p.autocast(p.eager_queue), BF16, note="autocast"),
        "torch.compile": Provider(p.compiled(p.autocast(p.eager_queue)), BF16, note="autocast"),
    },
}
LARGEST = dict.fromkeys(NT_XENT["float32"], 8192) | {  # N beyond which one call takes seconds
    "hsv": 32768,
    "hsv, float32 inputs": 16384,
    "lightly": 4096,
    "solo-learn's formula": 4096,
    "pytorch-metric-learning": 128,
}


def rows(n: int, seed: int, dim: int = DIM) -> Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


def two_views(n: int, dtype: torch.dtype, dim: int = DIM) -> tuple[Tensor, Tensor]:
    z0, z1 = (rows(n, seed, dim).to(DEVICE, dtype).requires_grad_() for seed in range(2))
    return z0, z1


def query_and_queue(n: int, m: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised; the keys are frozen."""
    q, positive, queue = (F.normalize(rows(size, seed)).to(DEVICE, dtype) for seed, size in enumerate((n, n, m)))
    return q.requires_grad_(), positive, queue


def nt_xent_case(n: int, products: str) -> Case:
    m = 2 * n
    once = Work(flops=m * m * DIM, exponentials=m * m / 2)  # S is symmetric: half of its products and exponentials
    return Case(
        operation="nt_xent",
        shape={"N": n},
        products=products,
        inputs=partial(two_views, n),
        providers=NT_XENT[products],
        work={
            "forward": once,
            "backward": Work(3 * once.flops, once.exponentials),
            "both": Work(4 * once.flops, 2 * once.exponentials),
        },
        timed=tuple(name for name in NT_XENT[products] if n <= LARGEST[name]),
        seconds={4096: 20, 8192: 15}.get(n, 5),
        rounds=(5, 51) if n <= 4096 else (3, 5) if n <= 8192 else (2, 2),
    )


def queue_case(products: str) -> Case:
    n, m = QUEUE
    forward = Work(flops=2 * n * m * DIM, exponentials=n * m)
    # One pass gives the loss and Σ_j p_ij k_j: nothing of the queue is left for the backward.
    both = Work(2 * forward.flops, forward.exponentials)
    return Case(
        operation="similarity_logsumexp",
        shape={"n": n, "queue": m},
        products=products,
        inputs=partial(query_and_queue, n, m),
        providers=MOCO[products],
        work={"forward": forward, "both": both},
        seconds=8,
    )


CASES = [
    *(nt_xent_case(n, "float32") for n in SIZES),
    *(nt_xent_case(n, "bfloat16") for n in SIZES if 256 <= n <= 16384 or QUICK),
    *(queue_case(products) for products in MOCO),
]


def test_speed(case: Case, mode: str, provider: str, record: Callable[[Case, str, str], None]) -> None:
    record(case, mode, provider)

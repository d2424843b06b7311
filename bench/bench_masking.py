"""Random masking and gather of tokens, forward and backward, against MAE's two argsorts and a gather.

    python bench/bench_masking.py [--batch 64] [--patches 196] [--values 768] [--keep 49] [--rounds 30]

Calls are interleaved: each round times every provider once, and the medians of the rounds are printed. Most of the time
of a memory-bound operation can be page faults; THP_MEM_ALLOC_ENABLE=1 gives torch's own allocations huge pages too.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from hsv_kernels import backends, gather_tokens, random_masking


def mae(tokens: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """Kept tokens, mask and ids_restore as the plain operation computes them."""
    B, L, D = tokens.shape
    order = torch.rand(B, L, device=tokens.device).argsort(dim=1)
    ids_restore = order.argsort(dim=1)
    kept = tokens.gather(1, order[:, :keep, None].expand(-1, -1, D))
    mask = torch.ones(B, L, device=tokens.device)
    mask[:, :keep] = 0
    return kept, mask.gather(1, ids_restore), ids_restore


def fused(tokens: Tensor, keep: int, step: int) -> tuple[Tensor, Tensor, Tensor]:
    ids_keep, ids_restore, mask = random_masking(
        *tokens.shape[:2], num_keep=keep, seed=0, offset=step, device=tokens.device
    )
    return gather_tokens(tokens, ids_keep), mask, ids_restore


def providers(tokens: Tensor, gradient: Tensor, keep: int) -> dict[str, Callable[[int], None]]:
    compiled = torch.compile(mae)

    def both(kept: Tensor) -> None:
        torch.autograd.grad(kept, tokens, gradient)

    return {
        "hsv": lambda step: both(fused(tokens, keep, step)[0]),
        "eager": lambda step: both(mae(tokens, keep)[0]),
        "torch.compile": lambda step: both(compiled(tokens, keep)[0]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("batch", 64), ("patches", 196), ("values", 768), ("keep", 49), ("rounds", 30), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)

    tokens = torch.randn(given.batch, given.patches, given.values, requires_grad=True)
    gradient = torch.randn(given.batch, given.keep, given.values)
    calls = providers(tokens, gradient, given.keep)
    walls, busy = ({name: [] for name in calls} for _ in range(2))
    for step in range(given.rounds + 3):
        for name, call in calls.items():
            wall, cpu = time.perf_counter(), time.process_time()
            call(step)
            if step >= 3:  # the first rounds compile and fill caches
                walls[name].append(1e3 * (time.perf_counter() - wall))
                busy[name].append(1e3 * (time.process_time() - cpu))

    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {given.threads} threads,", end=" ")
    print(
        f"huge pages for torch: {os.environ.get('THP_MEM_ALLOC_ENABLE', '0')}; masking: {backends()['masking']['cpu']}"
    )
    print(f"{'':14}{'wall ms':>10}{'cpu ms':>10}{'wall ÷ hsv':>12}{'cpu ÷ hsv':>12}")
    first = {kind: statistics.median(times["hsv"]) for kind, times in (("wall", walls), ("cpu", busy))}
    for name in calls:
        wall, cpu = statistics.median(walls[name]), statistics.median(busy[name])
        print(f"{name:14}{wall:10.2f}{cpu:10.2f}{wall / first['wall']:12.2f}{cpu / first['cpu']:12.2f}")


if __name__ == "__main__":
    main()

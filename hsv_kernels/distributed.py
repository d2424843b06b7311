"""Losses and statistics over all ranks of a torch.distributed job.

The rule: a value is the mean over all ranks' rows, and after DDP has averaged the gradients of the ranks they are the
gradient of that value, for uneven batches too. In one process every function here is the plain one.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from hsv_kernels import functional
from hsv_kernels.backends import Backend

__all__ = ["all_gather_rows", "all_reduce_sum", "nt_xent", "rank", "rank_mean", "world_size"]


def world_size() -> int:
    """Ranks of the job, 1 outside torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this rank, 0 outside torch.distributed."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return _AllReduceSum.apply(grad)


def all_reduce_sum(x: Tensor) -> Tensor:
    """Σ over ranks of x, any shape; its gradient is the sum of the ranks' gradients."""
    return x if world_size() == 1 else _AllReduceSum.apply(x)


def row_counts(x: Tensor) -> list[int]:
    """Rows of x on each rank."""
    counts = torch.zeros(world_size(), dtype=torch.int64, device=x.device)
    counts[rank()] = len(x)
    if world_size() > 1:
        dist.all_reduce(counts)
    return counts.tolist()


def all_gather_rows(x: Tensor, counts: list[int] | None = None) -> Tensor:
    """The rows of all ranks, [Σ n_r, ...] from [n_r, ...], in the order of the ranks; n_r may differ and may be 0.

    Each rank's gradient is the sum of what all ranks send back for its rows. `counts` saves the exchange of n_r.
    """
    if world_size() == 1:
        return x
    counts = row_counts(x) if counts is None else counts
    start = sum(counts[: rank()])
    padding = [0, 0] * (x.dim() - 1) + [start, sum(counts) - start - len(x)]
    return all_reduce_sum(F.pad(x, padding))  # a sum of blocks that do not overlap is their concatenation


def rank_mean(mean: Tensor, rows: int) -> Tensor:
    """This rank's part of a mean over the rows of all ranks, from the `mean` over its own `rows`.

    The ranks' results average to that mean, so DDP's averaging makes the gradient that of it for uneven rows too.
    """
    if world_size() == 1:
        return mean
    total = torch.tensor(float(rows), device=mean.device)
    dist.all_reduce(total)
    return mean * (rows * world_size() / total)


def nt_xent(z0: Tensor, z1: Tensor, temperature: float | Tensor = 0.1, *, backend: Backend | None = None) -> Tensor:
    """NT-Xent with the negatives of all ranks, the mean over all their anchors.

    Every rank gathers the embeddings and computes the whole loss, so all ranks return the same value.

    Args:
        z0, z1: [n, D] embeddings of this rank's images in two views; n may differ between ranks and may be 0.
        temperature: as in `hsv_kernels.nt_xent`.
        backend: as in `hsv_kernels.nt_xent`.

    Returns:
        The loss, a scalar. Its backward sums over ranks, which DDP's averaging turns into the gradient of the value.
    """
    if world_size() > 1:
        counts = row_counts(z0)
        z0, z1 = all_gather_rows(z0, counts), all_gather_rows(z1, counts)
    return functional.nt_xent(z0, z1, temperature, backend=backend)

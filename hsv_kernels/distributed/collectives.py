"""Sums, means and rows over all ranks of a torch.distributed job, with their gradients; identities in one process."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = [
    "all_gather_rows",
    "all_reduce_sum",
    "logsumexp_over_ranks",
    "mean_over_ranks",
    "no_rows",
    "rank",
    "rank_mean",
    "row_counts",
    "world_size",
]


def world_size() -> int:
    """Ranks of the job, 1 outside torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this rank, 0 outside torch.distributed."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _AllReduceSum.apply(grad)


def all_reduce_sum(x: Tensor) -> Tensor:
    """Σ over ranks of x, any shape; its gradient is the sum of the ranks' gradients."""
    return x if world_size() == 1 else _AllReduceSum.apply(x)


class _MeanOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, total: Tensor, count: Tensor) -> Tensor:
        sums = torch.stack([total.double(), count.double()])
        dist.all_reduce(sums)
        every = sums[1].where(sums[1] != 0, 1)
        ctx.save_for_backward((world_size() / every).to(total.dtype))
        return (sums[0] / every).to(total.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.saved_tensors[0], None


def mean_over_ranks(total: Tensor, count: int | Tensor) -> Tensor:
    """Σ total / Σ count over ranks, both scalars, the same value on every rank; 0 where Σ count is 0.

    Each rank's gradient is that of world_size · total / Σ count, which DDP averages into the gradient of the value.
    float64 for a float64 total, float32 otherwise: a rank without rows may have no losses but rows of a half type.
    """
    total = total.to(torch.promote_types(total.dtype, torch.float32))
    if not isinstance(count, Tensor):
        count = torch.full((), count, dtype=total.dtype, device=total.device)  # from the host without waiting
    count = count.to(total)
    if world_size() == 1:
        return total / count.where(count != 0, 1)
    return _MeanOverRanks.apply(total, count)


def rank_mean(mean: Tensor, rows: int) -> Tensor:
    """The mean over the rows of all ranks, from the `mean` over this rank's own `rows`; no rows' mean is not read.

    Value and gradient are those of `mean_over_ranks`.
    """
    if world_size() == 1:
        return mean
    return mean_over_ranks(mean * rows if rows else mean.masked_fill(torch.ones_like(mean, dtype=torch.bool), 0), rows)


def no_rows(*tensors: Tensor | float | None) -> Tensor:
    """The sum of no losses, 0, on the graph of these tensors: their backward joins that of ranks which have rows."""
    return sum(x[:0].sum() if x.dim() else 0 * x for x in tensors if isinstance(x, Tensor))


def row_counts(x: Tensor) -> list[int]:
    """Rows of x on each rank."""
    counts = torch.zeros(world_size(), dtype=torch.int64, device=x.device)
    counts[rank()] = len(x)
    if world_size() > 1:
        dist.all_reduce(counts)
    return counts.tolist()


class _AllGatherRows(torch.autograd.Function):
    """Blocks travel padded to the rows of the longest: every backend serves collectives of equal blocks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: list[int]) -> Tensor:
        ctx.counts, most = counts, max(counts)
        blocks = x.new_empty(len(counts) * most, *x.shape[1:])
        _gather_blocks(blocks, _pad_rows(x, most))
        return torch.cat([block[:count] for block, count in zip(blocks.split(most), counts, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        most = max(ctx.counts)
        mine = grad.new_empty(most, *grad.shape[1:])
        _sum_blocks(mine, torch.cat([_pad_rows(block, most) for block in grad.split(ctx.counts)]))
        return mine[: ctx.counts[rank()]], None


def _gather_blocks(blocks: Tensor, mine: Tensor) -> None:
    """Every rank's block into `blocks`, under the name that torch has for it: from 2.14 on the older one warns."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(blocks, mine)


def _sum_blocks(mine: Tensor, blocks: Tensor) -> None:
    """The sum over ranks of this rank's block of `blocks` into `mine`, under the name that torch has for it."""
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    scatter(mine, blocks)


def _pad_rows(x: Tensor, rows: int) -> Tensor:
    return F.pad(x, [0, 0] * (x.dim() - 1) + [0, rows - len(x)]).contiguous()


def all_gather_rows(x: Tensor, counts: Sequence[int] | None = None) -> Tensor:
    """The rows of all ranks, [Σ n_r, ...] from [n_r, ...], in the order of the ranks; n_r may differ and may be 0.

    Each rank's gradient is the sum of what all ranks send back for its rows. `counts` is n_r of each rank, exchanged
    where it is None.
    """
    if world_size() == 1:
        return x
    counts = row_counts(x) if counts is None else list(counts)
    return _AllGatherRows.apply(x, counts) if max(counts) else x


def logsumexp_over_ranks(x: Tensor) -> Tensor:
    """log Σ over ranks of exp x, element by element, without a gradient; −inf on a rank adds nothing."""
    if world_size() == 1:
        return x
    most = x.detach().clone()
    dist.all_reduce(most, dist.ReduceOp.MAX)
    shift = most.where(most != -torch.inf, 0)
    total = (x.detach() - shift).exp()
    dist.all_reduce(total)
    return total.log() + shift

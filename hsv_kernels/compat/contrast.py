"""InfoNCE over temperatures of any sign, which the libraries accept and `hsv_kernels.info_nce` does not."""

import torch
import torch.nn.functional as F
from torch import Tensor

from hsv_kernels.backends import resolve
from hsv_kernels.distributed import all_gather_rows, mean_over_ranks, rank, world_size
from hsv_kernels.distributed.collectives import row_counts
from hsv_kernels.functional import similarity_logsumexp
from hsv_kernels.rows import unit_rows

__all__ = ["gathered", "inverse", "queue_losses", "two_view_loss", "unread_by_backward"]


def inverse(temperature: float | Tensor) -> float | Tensor:
    """1 / temperature, of a number of any type or a tensor of one value: what `similarity_logsumexp` takes as scale."""
    return 1 / temperature.reshape(()) if isinstance(temperature, Tensor) else 1 / float(temperature)


def gathered(rows: Tensor) -> tuple[Tensor, int]:
    """The rows of all ranks, and where this rank's begin."""
    if world_size() == 1:
        return rows, 0
    counts = row_counts(rows)
    return all_gather_rows(rows, counts), sum(counts[: rank()])


def queue_losses(q: Tensor, k: Tensor, queue: Tensor, temperature: float | Tensor) -> Tensor:
    """log(1 + Σ_j exp(q_i · queue_j / τ − q_i · k_i / τ)) [N], of rows as they are, in the dtype of the queue."""
    q, k = q.to(queue.dtype), k.to(queue.dtype)
    if not len(queue):
        return (q * k).sum(1).to(torch.promote_types(q.dtype, torch.float32)) * 0
    d, _ = similarity_logsumexp(q, queue, scale=inverse(temperature), positive=k)
    return F.softplus(d, threshold=40)


def two_view_loss(out0: Tensor, out1: Tensor, temperature: float | Tensor, gather: bool) -> Tensor:
    """NT-Xent of [N, D] against [N, D], the negatives of all ranks if `gather`; the mean over the anchors."""
    z = unit_rows(torch.cat([out0, out1]))
    partner = torch.arange(len(z), device=z.device).roll(len(out0))
    every, start = gathered(z) if gather else (None, 0)
    d, _ = similarity_logsumexp(
        z, every, scale=inverse(temperature), exclude_self=True, self_offset=start, positive=partner + start
    )
    losses = F.softplus(d, threshold=40)
    return mean_over_ranks(losses.sum(), len(losses)) if gather else losses.mean()


def unread_by_backward(queue: Tensor) -> Tensor:
    """The queue, or a copy where the reference serves it: that one reads it again in backward, after the push."""
    return queue.clone() if resolve("contrast", queue, None) == "reference" else queue

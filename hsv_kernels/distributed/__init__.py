"""Losses and statistics over all ranks of a torch.distributed job.

The rule: a value is the mean over the anchors (rows) of all ranks and the same on every rank, and after DDP has
averaged the gradients of the ranks they are the gradient of that value, for uneven batches and ranks without rows too.
Every rank calls every function, in the same order, whatever rows it has: each is a collective. In one process every
function here is the plain one.
"""

from hsv_kernels.distributed.collectives import (
    all_gather_rows,
    all_reduce_sum,
    logsumexp_over_ranks,
    mean_over_ranks,
    rank,
    rank_mean,
    world_size,
)
from hsv_kernels.distributed.contrast import Negatives, nt_xent
from hsv_kernels.distributed.regression import masked_mse

__all__ = [
    "Negatives",
    "all_gather_rows",
    "all_reduce_sum",
    "logsumexp_over_ranks",
    "masked_mse",
    "mean_over_ranks",
    "nt_xent",
    "rank",
    "rank_mean",
    "world_size",
]

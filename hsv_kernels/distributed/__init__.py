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
from hsv_kernels.distributed.contrast import Negatives, info_nce, nt_xent
from hsv_kernels.distributed.distillation import distillation_loss, sinkhorn_centre
from hsv_kernels.distributed.regression import masked_mse, negative_cosine

__all__ = [
    "Negatives",
    "all_gather_rows",
    "all_reduce_sum",
    "distillation_loss",
    "info_nce",
    "logsumexp_over_ranks",
    "masked_mse",
    "mean_over_ranks",
    "negative_cosine",
    "nt_xent",
    "rank",
    "rank_mean",
    "sinkhorn_centre",
    "world_size",
]

"""Projection heads and the batch normalisation that they share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hsv_kernels.distributed import all_reduce_sum, world_size

__all__ = ["SyncBatchNorm", "projector"]


class SyncBatchNorm(nn.BatchNorm1d):
    """Batch normalisation of [N, D] over the rows of all ranks, on any device, for any N per rank.

    Statistics and result are float32 whatever the autocast. A rank without rows joins in, and a single row over all
    ranks is normalised to 0. In one process it is `BatchNorm1d`.
    """

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            if world_size() == 1 or not (self.training or self.running_mean is None):
                return super().forward(x.float())
            return self._across_ranks(x.float())

    def _across_ranks(self, x: Tensor) -> Tensor:
        count = all_reduce_sum(x.new_tensor([len(x)])).clamp_min(1)
        mean = all_reduce_sum(x.sum(0)) / count
        centred = x - mean
        variance = all_reduce_sum(centred.square().sum(0)) / count
        if self.running_mean is not None:
            self._track(mean.detach(), variance.detach() * count / (count - 1).clamp_min(1))
        y = centred * torch.rsqrt(variance + self.eps)
        return y * self.weight + self.bias if self.affine else y

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        self.num_batches_tracked += 1
        momentum = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(variance, momentum)


def projector(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    """The two-layer head of SimCLR: linear, batch normalisation, ReLU, linear."""
    return nn.Sequential(
        nn.Linear(in_dim, hidden_dim, bias=False),
        SyncBatchNorm(hidden_dim),
        nn.ReLU(inplace=True),
        nn.Linear(hidden_dim, out_dim),
    )

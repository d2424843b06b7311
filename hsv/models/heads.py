"""Projection heads and the batch normalisation that they share."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hsv_kernels.distributed import all_reduce_sum, world_size

__all__ = ["Prototypes", "SyncBatchNorm", "mlp"]


class SyncBatchNorm(nn.BatchNorm1d):
    """Batch normalisation of [N, D] over the rows of all ranks, on any device, for any N per rank.

    Statistics and result are float32 whatever the autocast. A rank without rows joins in, and a single row over all
    ranks is normalised to 0. In one process, for more than one row, it is `BatchNorm1d`.
    """

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            training = self.training or self.running_mean is None
            if not training or (world_size() == 1 and len(x) > 1):
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


def mlp(
    widths: Sequence[int],
    *,
    norm: bool = True,
    last_norm: bool = False,
    activation: Literal["relu", "gelu"] = "relu",
) -> nn.Sequential:
    """Linear layers through `widths`, batch normalisation and activation between them.

    Args:
        widths: of the input, of each hidden layer, and of the output.
        norm: normalise hidden layers.
        last_norm: normalise the output, without scale and shift (SimSiam, MoCo v3).
        activation: after each hidden layer.
    """
    layers: list[nn.Module] = []
    for before, after in pairwise(widths[:-1]):
        layers.append(nn.Linear(before, after, bias=not norm))
        if norm:
            layers.append(SyncBatchNorm(after))
        layers.append(nn.ReLU(inplace=True) if activation == "relu" else nn.GELU())
    layers.append(nn.Linear(widths[-2], widths[-1], bias=not last_norm))
    if last_norm:
        layers.append(SyncBatchNorm(widths[-1], affine=False))
    return nn.Sequential(*layers)


class Prototypes(nn.Module):
    """Cosines [N, K] of rows [N, D] with K learned directions: DINO's last layer, a weight-normed one of length 1."""

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(count, dim) * dim**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(x.float(), dim=1), F.normalize(self.weight, dim=1))

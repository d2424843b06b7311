"""SimCLR: two views of an image agree, views of other images do not (Chen et al. 2020, arXiv:2002.05709)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hsv.config import SimCLRConfig
from hsv.models import Encoder, Encoding, projector
from hsv.objectives.request import Request, View
from hsv_kernels.distributed import nt_xent

__all__ = ["SimCLR"]


class SimCLR(nn.Module):
    """A projection head over the pooled tokens, and NT-Xent over the images of all ranks.

    For the projections z of image i, with j its other view and k all other views of the batch,

        loss = mean_i −log( exp(cos(z_i, z_j) / τ) / Σ_{k≠i} exp(cos(z_i, z_k) / τ) )
    """

    def __init__(self, encoder: Encoder, config: SimCLRConfig) -> None:
        super().__init__()
        self.config = config
        self.requests = [Request(View(config.view, slot)) for slot in (0, 1)]
        self.projector = projector(encoder.dim, config.hidden_dim, config.out_dim)

    def forward(self, encodings: dict[Request, Encoding], images: dict[View, Tensor]) -> Tensor:
        """Encodings of both views to the loss."""
        pooled = [encodings[request].pool(self.config.pool) for request in self.requests]  # 2 × [B, D]
        z = self.projector(torch.cat(pooled))  # [2B, out_dim], batch statistics over both views
        z0, z1 = z.chunk(2)
        return nt_xent(z0, z1, self.config.temperature)

    @staticmethod
    def chance(batch: int) -> float:
        """The loss of projections that tell nothing, for `batch` images over all ranks."""
        return math.log(2 * batch - 1)

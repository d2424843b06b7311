"""SimCLR: two views of an image agree, views of other images do not (Chen et al. 2020, arXiv:2002.05709)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hsv.config import Config
from hsv.models import Encoder, mlp
from hsv.objectives.objective import Batch, Objective
from hsv.objectives.request import Request, View
from hsv_kernels.distributed import nt_xent

__all__ = ["SimCLR"]


class SimCLR(Objective):
    """A projection head over the pooled tokens, and NT-Xent over the images of all ranks.

    For the projections z of image i, with j its other view and k all other views of the batch,

        loss = mean_i −log( exp(cos(z_i, z_j) / τ) / Σ_{k≠i} exp(cos(z_i, z_k) / τ) )

    Batch statistics of the head are over both views. The head reads the mean of the patch tokens, for no ViT had one of
    SimCLR's own.
    """

    def __init__(self, encoder: Encoder, config: Config, others: dict[str, Objective]) -> None:
        super().__init__()
        self.config, self.negatives = config.simclr, config.run.negatives
        self.requests = [Request(View(self.config.view, slot)) for slot in (0, 1)]
        self.projector = mlp([encoder.dim, self.config.hidden_dim, self.config.out_dim])

    def forward(self, batch: Batch) -> Tensor:
        pooled = [batch.student[request].pool(self.config.pool) for request in self.requests]  # 2 × [B, D]
        z0, z1 = self.projector(torch.cat(pooled)).chunk(2)  # [B, out_dim] each
        return nt_xent(z0, z1, self.config.temperature, negatives=self.negatives, counts=batch.counts)

    def chance(self, batch: int) -> float:
        """ln(2B − 1): each of the other views as likely."""
        return math.log(2 * batch - 1)

"""CPC: rows of patches predict the rows below (van den Oord et al. 2018, arXiv:1807.03748; Hénaff et al. 2020)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hsv.config import Config
from hsv.models import Encoder, mlp
from hsv.objectives.objective import Batch, Objective
from hsv.objectives.request import Causal, Request, View
from hsv_kernels.distributed import info_nce

__all__ = ["CPC"]


class CPC(Objective):
    """With c the token of the patch in row r and column x, which sees rows up to r, and z the embedding of one patch by
    itself,

        loss = mean over k, mean over patches of −log( exp(W_k c_rx · z_{r+k,x} / τ) / Σ_j exp(W_k c_rx · z_j / τ) )

    j runs over the patches of row k and those below, of all images: other columns and rows of the same image, and all
    of the others. Predictions and embeddings are brought to the unit sphere and divided by τ, unlike in the papers:
    plain inner products have no scale of their own, and a transformer's grow.
    """

    def __init__(self, encoder: Encoder, config: Config, others: dict[str, Objective]) -> None:
        super().__init__()
        self.config, self.negatives = config.cpc, config.run.negatives
        self.requests = [Request(View(self.config.view, 0), Causal())]
        self.grid = encoder.grid
        if self.grid[0] < 2:
            raise ValueError(f"cpc: got {self.grid[0]} row of patches; allowed: at least 2")
        self.steps = range(1, min(self.config.steps, self.grid[0] - 1) + 1)
        self.target = mlp([encoder.dim, self.config.hidden_dim, self.config.out_dim], norm=False)
        self.predictors = nn.ModuleList(nn.Linear(encoder.dim, self.config.out_dim) for _ in self.steps)

    def forward(self, batch: Batch) -> Tensor:
        encoded = batch.student[self.requests[0]]
        context = encoded.patches.unflatten(1, self.grid)  # [B, rows, columns, D]
        targets = self.target(encoded.embedded).unflatten(1, self.grid)
        losses = [
            info_nce(
                predictor(context[:, :-k]).flatten(0, 2),
                targets[:, k:].flatten(0, 2),
                temperature=self.config.temperature,
                negatives=self.negatives,
                key_gradient=True,
                counts=[images * (self.grid[0] - k) * self.grid[1] for images in batch.counts],
            )
            for k, predictor in zip(self.steps, self.predictors, strict=True)
        ]
        return torch.stack(losses).mean()

    def chance(self, batch: int) -> float:
        """Every patch as likely, averaged over the steps ahead."""
        rows, columns = self.grid
        return sum(math.log(batch * (rows - k) * columns) for k in self.steps) / len(self.steps)

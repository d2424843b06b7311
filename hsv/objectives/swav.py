"""SwAV: predict from one crop the cluster of another (Caron et al. 2020, arXiv:2006.09882)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hsv.config import Config
from hsv.models import Encoder, mlp
from hsv.objectives.crops import local_requests
from hsv.objectives.objective import Batch, Objective
from hsv.objectives.request import Request, View
from hsv.schedules import capped
from hsv_kernels.distributed import distillation_loss, sinkhorn_centre

__all__ = ["SwAV"]


class SwAV(Objective):
    """With s the scores of a crop, cosines with K prototypes, and q_g the assignment of a large crop g, which
    Sinkhorn–Knopp makes use all prototypes equally,

        loss = mean over g and over the other crops, mean_i −Σ_k q_g,ik log softmax(s_i / τ)_k

    Prototypes are brought back to the unit sphere after each step and do not learn at first. There is no store of
    earlier projections, which the published recipe has for batches smaller than the number of prototypes: the presets
    take few prototypes instead.
    """

    def __init__(self, encoder: Encoder, config: Config, others: dict[str, Objective]) -> None:
        super().__init__()
        self.config = config.swav
        large = [Request(View(self.config.view, slot)) for slot in (0, 1)]
        self.requests = [*large, *local_requests(encoder, self.config.local_view, self.config.num_locals)]
        self.projector = mlp([encoder.dim, self.config.hidden_dim, self.config.out_dim])
        self.prototypes = nn.Linear(self.config.out_dim, self.config.prototypes, bias=False)
        self.after_update()

    def forward(self, batch: Batch) -> Tensor:
        pooled = [batch.student[request].pool(self.config.pool) for request in self.requests]
        z = F.normalize(self.projector(torch.cat(pooled)).float(), dim=1)
        scores = self.prototypes(z).unflatten(0, (len(self.requests), len(batch)))  # [S, B, K]
        losses = []
        for g in (0, 1):
            target = scores[g : g + 1].detach()
            centre = sinkhorn_centre(target, self.config.epsilon, iterations=self.config.iterations)
            loss, _ = distillation_loss(
                scores,
                target,
                student_temperature=self.config.temperature,
                teacher_temperature=self.config.epsilon,
                centre=centre,
                pairs=[(0, s) for s in range(len(self.requests)) if s != g],
            )
            losses.append(loss)
        return torch.stack(losses).mean()

    def chance(self, batch: int) -> float:
        """ln K: every prototype as likely."""
        return math.log(self.config.prototypes)

    def before_update(self) -> None:
        if self.progress.within(self.config.freeze_prototypes_epochs):
            self.prototypes.weight.grad = None

    @torch.no_grad()
    def after_update(self) -> None:
        self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))

    def schedule(self, steps: int, epoch: int) -> list[str]:
        return [f"prototypes fixed for {capped(self.config.freeze_prototypes_epochs, steps, epoch):,} steps"]

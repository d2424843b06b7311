"""DINO: self-distillation without labels, over crops of two sizes (Caron et al. 2021, arXiv:2104.14294)."""

from __future__ import annotations

import torch
from torch import Tensor

from hsv.config import Config
from hsv.models import Encoder
from hsv.objectives.crops import local_requests
from hsv.objectives.distillation import Distillation, SelfDistillation
from hsv.objectives.objective import Batch, Objective
from hsv.objectives.request import Request, View

__all__ = ["DINO"]


class DINO(SelfDistillation):
    """With q the momentum encoder's distribution over K prototypes for a large crop, sharpened by τ_t and centred, and
    p the student's for any other crop,

        loss = mean over pairs of crops, mean_i −Σ_k q_ik log p_ik

    Optimiser: AdamW with the shared rates; the decay of the weights rises along a cosine in the preset for 224 pixels,
    as published. Temperature warm-up (30 epochs) and the frozen prototypes (1 epoch) are at most a tenth of the run.

    The preset for 32 pixels, for runs of some hundred steps, differs more: Sinkhorn–Knopp in place of the running
    centre (as in SwAV and DINOv2), since it spreads the images over the prototypes from the first step on; a bottleneck
    of 32 and batch normalisation in the head, which keep images apart; τ_t = 0.02 and momentum 0.9 from the start, for
    a sharp teacher that follows; mean pooling; a constant decay.
    """

    def __init__(self, encoder: Encoder, config: Config, others: dict[str, Objective]) -> None:
        super().__init__(encoder, config.dino)
        specs = self.config.global_view, self.config.second_global_view
        self.teacher_requests = [Request(View(spec, slot)) for slot, spec in enumerate(specs)]
        small = local_requests(encoder, self.config.local_view, self.config.num_locals)
        self.requests = [*self.teacher_requests, *small]
        self.distillation = Distillation(self.config, self.config.out_dim)

    def forward(self, batch: Batch) -> Tensor:
        pooled = [batch.student[request].pool(self.config.pool) for request in self.requests]
        student = self.head(torch.cat(pooled)).unflatten(0, (len(self.requests), len(batch)))  # [S, B, K]
        with torch.no_grad():
            pooled = [batch.teacher[request].pool(self.config.pool) for request in self.teacher_requests]
            teacher = self.teacher_head(torch.cat(pooled)).unflatten(0, (2, len(batch)))  # [2, B, K]
        return self.distillation(student, teacher, self.progress)

    def schedule(self, steps: int, epoch: int) -> list[str]:
        return self.distillation.schedule(steps, epoch)

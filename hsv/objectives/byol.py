"""BYOL: predict what a momentum encoder makes of the other view (Grill et al. 2020, arXiv:2006.07733)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from hsv.config import Config
from hsv.models import Encoder, mlp, teacher_of
from hsv.objectives.objective import Batch, Objective
from hsv.objectives.request import Request, View
from hsv_kernels.distributed import negative_cosine

__all__ = ["BYOL"]


class BYOL(Objective):
    """With p the predictor's output for one view and z the momentum encoder's projection of the other,

        loss = mean_i 2 − 2 cos(p_i, z_i)

    averaged over the two directions (published: their sum, twice this value). Batch statistics of the heads are per
    view. The preset for 32 pixels starts at momentum 0.96, since its runs are as long as a few horizons of the
    published one, and has the predictor learn thirty times as fast: what keeps features from collapsing is that it is
    near its best for the present encoder (also Tian et al. 2021, arXiv:2102.06810).
    """

    error = False

    def __init__(self, encoder: Encoder, config: Config, others: dict[str, Objective]) -> None:
        super().__init__()
        self.config, self.momentum = config.byol, config.byol.momentum
        views = self.config.view, self.config.second_view
        self.requests = self.teacher_requests = [Request(View(spec, slot)) for slot, spec in enumerate(views)]
        hidden, out = self.config.hidden_dim, self.config.out_dim
        self.projector = mlp([encoder.dim, hidden, out])
        self.predictor = mlp([out, hidden, out])
        self.teacher_projector = teacher_of(self.projector)

    def forward(self, batch: Batch) -> Tensor:
        p0, p1 = (self.predictor(self.projector(batch.student[r].pool(self.config.pool))) for r in self.requests)
        with torch.no_grad():
            z0, z1 = (self.teacher_projector(batch.teacher[r].pool(self.config.pool)) for r in self.teacher_requests)
        return 2 + negative_cosine(p0, z1) + negative_cosine(p1, z0)

    def chance(self, batch: int) -> float:
        """2: directions that tell nothing of each other."""
        return 2.0

    def teacher_heads(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        yield self.teacher_projector, self.projector

    def lr_scales(self) -> Iterator[tuple[nn.Module, float]]:
        yield self.predictor, self.config.predictor_lr_scale

"""MoCo: queries find the keys that a momentum encoder gives other views (v2 arXiv:2003.04297, v3 arXiv:2104.02057)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from hsv.config import Config
from hsv.models import Encoder, mlp, teacher_of
from hsv.objectives.objective import Batch, Objective
from hsv.objectives.request import Request, View
from hsv_kernels import KeyQueue
from hsv_kernels.distributed import all_gather_rows, info_nce

__all__ = ["MoCo"]


class MoCo(Objective):
    """InfoNCE of queries q against the keys k of the momentum encoder,

        loss_i = −log( exp(q_i · k_i / τ) / Σ_j exp(q_i · k_j / τ) ),  q and k on the unit sphere

    v3: j runs over the batch of all ranks, both views are query and key in turn, queries pass a predictor, and the
    loss is 2τ times the sum of both directions. v2: j runs over k_i and a queue of earlier keys, in one direction; the
    head has two layers and no batch normalisation, so no images need to be shuffled between ranks.

    The preset for 32 pixels leaves the predictor out and one layer of the projector too: in runs of some hundred steps
    deep heads learn in the encoder's place.

    Statistics of v3's heads are per view. The patch embedding learns, unlike in v3, unless `freeze_patch_embed` is set:
    it belongs to the other objectives too.
    """

    def __init__(self, encoder: Encoder, config: Config, others: dict[str, Objective]) -> None:
        super().__init__()
        self.config, self.negatives = config.moco, config.run.negatives
        self.momentum, self.momentum_rises = self.config.momentum, self.config.version == "v3"
        views = [Request(View(self.config.view, slot)) for slot in (0, 1)]
        hidden, out, layers = self.config.hidden_dim, self.config.out_dim, self.config.projector_layers
        if self.config.version == "v3":
            self.requests = self.teacher_requests = views
            self.projector = mlp([encoder.dim, *[hidden] * ((layers or 3) - 1), out], last_norm=True)
            self.predictor = mlp([out, hidden, out], last_norm=True) if self.config.predictor else nn.Identity()
        else:
            self.requests, self.teacher_requests = views[:1], views[1:]
            self.projector = mlp([encoder.dim, *[hidden] * ((layers or 2) - 1), out], norm=False)
            self.queue = KeyQueue(self.config.queue_size, out)
        self.teacher_projector = teacher_of(self.projector)
        if self.config.freeze_patch_embed:
            encoder.vit.patch_embed.requires_grad_(False)

    def forward(self, batch: Batch) -> Tensor:
        return self.both_ways(batch) if self.config.version == "v3" else self.against_queue(batch)

    def both_ways(self, batch: Batch) -> Tensor:
        """The loss of v3."""
        queries = [self.predictor(self.projector(batch.student[r].pool(self.config.pool))) for r in self.requests]
        keys = self.keys(batch)
        losses = [
            info_nce(q, k, temperature=self.config.temperature, negatives=self.negatives, counts=batch.counts)
            for q, k in zip(queries, reversed(keys), strict=True)
        ]
        return 2 * self.config.temperature * torch.stack(losses).sum()

    def against_queue(self, batch: Batch) -> Tensor:
        """The loss of v2. The keys enter the queue afterwards, as those of all ranks."""
        q = self.projector(batch.student[self.requests[0]].pool(self.config.pool))
        (k,) = self.keys(batch)
        loss = info_nce(q, k, self.queue.keys, temperature=self.config.temperature)
        if self.training:
            self.queue.push(all_gather_rows(k, batch.counts))
        return loss

    @torch.no_grad()
    def keys(self, batch: Batch) -> list[Tensor]:
        """[B, out_dim] of each view that the momentum encoder sees."""
        return [self.teacher_projector(batch.teacher[r].pool(self.config.pool)) for r in self.teacher_requests]

    def chance(self, batch: int) -> float:
        """Every candidate as likely: ln(K + 1) with a queue of K, 4τ ln B without."""
        if self.config.version == "v2":
            return math.log(self.config.queue_size + 1)
        return 4 * self.config.temperature * math.log(batch)

    def teacher_heads(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        yield self.teacher_projector, self.projector

"""iBOT: self-distillation of crops and of masked patches (Zhou et al. 2022, arXiv:2111.07832)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from hsv.config import Config
from hsv.data.hashing import Stream, uniform
from hsv.models import Encoder
from hsv.objectives.blocks import block_masks
from hsv.objectives.crops import local_requests
from hsv.objectives.distillation import Distillation, SelfDistillation
from hsv.objectives.objective import Batch, Objective
from hsv.objectives.request import Encoded, Replace, Request, View

__all__ = ["IBOT"]


class IBOT(SelfDistillation):
    """DINO's loss of class tokens (or what `pool` says), of masked large crops and small ones against the other large
    crop as the momentum encoder sees it whole; and the same cross-entropy between the tokens of each masked patch in
    one large crop,

        loss = mean over pairs of crops, H(q_u, p_v)  +  mean over large crops u, mean_{l masked in u} H(q_ul, p_ul)

    One head with K prototypes, and with `batch_norm` one set of its statistics, serves both; their centres are two. An
    image without masked patches counts as 0 in the mean. Temperature warm-up (30 epochs) and the frozen prototypes
    (1 epoch) are at most a tenth of the run. The preset for 32 pixels differs as DINO's does.
    """

    def __init__(self, encoder: Encoder, config: Config, others: dict[str, Objective]) -> None:
        super().__init__(encoder, config.ibot)
        self.seed = config.run.seed
        self.grid = encoder.grid
        most = (self.config.mask_ratio + self.config.mask_ratio_spread) * encoder.num_patches
        if most < 1 and self.config.mask_probability:
            raise ValueError(
                f"ibot.mask_ratio: got {most:g} of {encoder.num_patches} patches at most; allowed: 1 or more"
            )
        views = [View(self.config.global_view, 0), View(self.config.second_global_view, 1)]
        self.teacher_requests = [Request(view) for view in views]
        self.masked = [Request(view, Replace("ibot")) for view in views]
        self.requests = [*self.masked, *local_requests(encoder, self.config.local_view, self.config.num_locals)]
        self.mask_token = nn.Parameter(torch.zeros(encoder.dim))
        self.image_loss = Distillation(self.config, self.config.out_dim)
        self.patch_loss = Distillation(self.config, self.config.out_dim)

    def replaced(self, request: Request, count: int, first_index: int, draw: int) -> tuple[Tensor, Tensor]:
        """Block masks: none for a share of the images, else of a share that is drawn for each."""
        key, indices = (self.seed, draw, request.view.slot), np.arange(first_index, first_index + count)
        some, share = uniform((Stream.IBOT_SHARE, *key), indices, 2).T
        share = self.config.mask_ratio + self.config.mask_ratio_spread * (2 * share - 1)
        patches = np.where(some < self.config.mask_probability, share * math.prod(self.grid), 0).astype(np.int64)
        masks = block_masks((Stream.IBOT_BLOCKS, *key), indices, self.grid, patches)
        return torch.from_numpy(masks).to(self.mask_token.device), self.mask_token

    def forward(self, batch: Batch) -> Tensor:
        crops = [batch.student[request] for request in self.requests]
        whole = [batch.teacher[request] for request in self.teacher_requests]
        masks = [crop.mask.bool() for crop in crops[:2]]
        student = self.logits(self.head, crops, masks, len(batch))
        with torch.no_grad():
            teacher = self.logits(self.teacher_head, whole, masks, len(batch))
        image = self.image_loss(student[0], teacher[0], self.progress)
        weights = torch.cat([(1 / mask.sum(1, keepdim=True)).expand_as(mask)[mask] for mask in masks])
        patches = self.patch_loss(student[1], teacher[1], self.progress, weights=weights, samples=2 * len(batch))
        return image + patches

    def logits(
        self, head: nn.Module, crops: Sequence[Encoded], masks: Sequence[Tensor], images: int
    ) -> tuple[Tensor, Tensor]:
        """Logits of each crop [S, B, K] and, in one pass, of the masked patches [1, N, K]."""
        pooled = torch.cat([crop.pool(self.config.pool) for crop in crops])
        patches = [crop.patches[mask] for crop, mask in zip(crops, masks, strict=False)]
        scores = head(torch.cat([pooled, *patches]))
        return scores[: len(pooled)].unflatten(0, (len(crops), images)), scores[None, len(pooled) :]

    def chance(self, batch: int) -> float:
        """ln K for the crops and ln K for the patches of images that are masked."""
        return super().chance(batch) * (1 + self.config.mask_probability)

    def schedule(self, steps: int, epoch: int) -> list[str]:
        return self.image_loss.schedule(steps, epoch)

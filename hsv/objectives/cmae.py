"""CMAE: masked reconstruction and contrast with a momentum encoder (Huang et al. 2022, arXiv:2207.13532)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from hsv.config import Config
from hsv.models import Decoder, Encoder, mlp, teacher_of
from hsv.objectives.objective import Batch, Objective
from hsv.objectives.pixels import PixelObjective
from hsv.objectives.request import Drop, Encoded, Request, View
from hsv_kernels.distributed import info_nce, masked_mse

__all__ = ["CMAE"]


class CMAE(PixelObjective):
    """From the visible tokens of a masked view one decoder makes the removed pixels, another the features of all
    patches, whose mean finds what the momentum encoder makes of the whole view, moved by a few pixels and recoloured,

        loss = mean_removed ‖pred − patch‖² + 2τ · mean_i −log( exp(q_i · k_i / τ) / Σ_j exp(q_i · k_j / τ) )

    The target's view has the same crop. Only it is moved, by up to 15 pixels either way: in the paper both views are,
    within one window of 31 pixels, which comes to the same distances less its corners. The preset for 32 pixels starts
    at momentum 0.9, for a teacher that follows in short runs.
    """

    def __init__(self, encoder: Encoder, config: Config, others: dict[str, Objective]) -> None:
        super().__init__(encoder, config.cmae)
        self.negatives = config.run.negatives
        self.momentum = self.config.momentum
        self.requests = [Request(View(self.config.view, 0), Drop(self.config.mask_ratio))]
        self.teacher_requests = [Request(View(self.config.target_view, 0))]
        p, q = self.patch_size
        self.pixel_decoder = self.decoder(encoder, self.config.decoder_depth, p * q * encoder.channels)
        self.feature_decoder = self.decoder(encoder, self.config.feature_depth, encoder.dim)
        hidden, out = self.config.hidden_dim, self.config.out_dim
        self.projector = mlp([encoder.dim, hidden, out])
        self.predictor = mlp([out, hidden, out])
        self.teacher_projector = teacher_of(self.projector)

    def decoder(self, encoder: Encoder, depth: int, out_dim: int) -> Decoder:
        """A decoder of the width that both have."""
        dim = self.config.decoder_dim
        return Decoder(encoder.dim, encoder.num_patches, dim=dim, depth=depth, heads=max(1, dim // 32), out_dim=out_dim)

    def forward(self, batch: Batch) -> Tensor:
        (request,), (target,) = self.requests, self.teacher_requests
        visible = batch.student[request]
        image = batch.images[request.view]
        pixels = masked_mse(self.predict(visible), image, visible.mask, self.patch_size, norm_pix=self.config.norm_pix)
        q = self.predictor(self.projector(self.feature_decoder(visible.patches, visible.ids_restore).mean(1)))
        with torch.no_grad():
            k = self.teacher_projector(batch.teacher[target].pool("mean"))
        contrast = info_nce(q, k, temperature=self.config.temperature, negatives=self.negatives, counts=batch.counts)
        return pixels + 2 * self.config.temperature * contrast

    def predict(self, encoded: Encoded) -> Tensor:
        return self.pixel_decoder(encoded.patches, encoded.ids_restore)

    def chance(self, batch: int) -> float:
        """1 for the pixels, and every key as likely."""
        return 1 + 2 * self.config.temperature * math.log(batch)

    def teacher_heads(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        yield self.teacher_projector, self.projector

"""CAN: contrast, masked reconstruction and noise prediction in one (Mishra et al. 2022, arXiv:2210.16870)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hsv.config import Config
from hsv.models import Decoder, Encoder, mlp
from hsv.objectives.objective import Batch, Objective
from hsv.objectives.pixels import PixelObjective
from hsv.objectives.request import Drop, Encoded, Request, View
from hsv_kernels.distributed import masked_mse, nt_xent

__all__ = ["CAN"]


class CAN(PixelObjective):
    """Both views are noised and masked; the mean of the visible tokens is contrasted, and a decoder says what the
    removed patches show and which noise lies on the visible ones,

        loss = w_c · NT-Xent(z_0, z_1) + (1 − w_c − w_n) · mean_removed ‖pred − patch‖² + w_n · mean_visible ‖ε̂ − ε‖²

    with ε the noise at deviation 1, so that its error is 1 at chance like that of the pixels. Each image's deviation is
    uniform in [0, σ], and the decoder is told. Published weights: w_c = .03 and w_n = .3, or 0 without noise. The
    weights are part of the method; whoever wants them found names simclr and mae.
    """

    def __init__(self, encoder: Encoder, config: Config, others: dict[str, Objective]) -> None:
        super().__init__(encoder, config.can)
        self.negatives = config.run.negatives
        self.noisy = self.config.noise_weight > 0
        noise = self.config.noise if self.noisy else 0.0
        drop = Drop(self.config.mask_ratio)
        self.requests = [Request(View(self.config.view, slot), drop, noise, self.noisy) for slot in (0, 1)]
        self.projector = mlp([encoder.dim, self.config.hidden_dim, self.config.out_dim])
        p, q = self.patch_size
        self.pixels, dim = p * q * encoder.channels, self.config.decoder_dim
        self.decoder = Decoder(
            encoder.dim,
            encoder.num_patches,
            dim=dim,
            depth=self.config.decoder_depth,
            heads=max(1, dim // 32),
            out_dim=self.pixels * (2 if self.noisy else 1),
        )
        if self.noisy:
            self.level = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))

    def forward(self, batch: Batch) -> Tensor:
        visible = [batch.student[request] for request in self.requests]
        z = self.projector(torch.cat([view.pool("mean") for view in visible]))
        z0, z1 = z.unflatten(0, (2, len(batch)))
        contrast = nt_xent(z0, z1, self.config.temperature, negatives=self.negatives, counts=batch.counts)
        pixels = [self.reconstruction(batch, *pair) for pair in zip(self.requests, visible, strict=True)]
        return torch.lerp(torch.stack(pixels).mean(), contrast, self.config.contrast_weight)

    def reconstruction(self, batch: Batch, request: Request, visible: Encoded) -> Tensor:
        """The weighted mean of a view's two errors, of weight 1 in all."""
        pred = self.decode(visible)
        removed, image = visible.mask, batch.images[request.view]
        error = masked_mse(pred[..., : self.pixels], image, removed, self.patch_size, norm_pix=self.config.norm_pix)
        if not self.noisy:
            return error
        noise = visible.noise / visible.noise_level.clamp_min(1e-8)[:, None, None, None]
        noise_error = masked_mse(pred[..., self.pixels :], noise, 1 - removed, self.patch_size, norm_pix=False)
        return torch.lerp(error, noise_error, self.config.noise_weight / (1 - self.config.contrast_weight))

    def decode(self, visible: Encoded) -> Tensor:
        """Patches [B, L, p·q·C], and beside them the noise of each if there is any, [B, L, 2·p·q·C]."""
        level = self.level(self.frequencies(visible.noise_level)) if self.noisy else None
        return self.decoder(visible.patches, visible.ids_restore, level)

    def predict(self, encoded: Encoded) -> Tensor:
        return self.decode(encoded)[..., : self.pixels].contiguous()

    def frequencies(self, level: Tensor) -> Tensor:
        """Deviations [B] as sines and cosines [B, decoder_dim] of frequencies from 1 to 10,000 over the range."""
        count = self.config.decoder_dim // 2
        rates = torch.logspace(0, 4, count, device=level.device)
        angles = (level / self.config.noise)[:, None] * rates
        return torch.cat([angles.sin(), angles.cos()], 1)

    def chance(self, batch: int) -> float:
        """Each of the other views as likely, each patch predicted by its mean, no noise."""
        weight = self.config.contrast_weight
        return weight * math.log(2 * batch - 1) + (1 - weight)

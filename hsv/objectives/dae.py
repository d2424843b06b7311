"""DAE: the clean pixels of a noisy image (Vincent et al. 2008)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hsv.config import Config
from hsv.models import Encoder
from hsv.objectives.objective import Batch, Objective
from hsv.objectives.pixels import PixelObjective
from hsv.objectives.request import Encoded, Request, View
from hsv_kernels.distributed import masked_mse

__all__ = ["DAE"]


class DAE(PixelObjective):
    """Gaussian noise of deviation σ on the normalised image, or of one drawn for each image from [0, σ], and the error
    of every clean patch,

        loss = mean over patches of ‖W · token − patch‖² / pixels

    The head is linear, so the encoder denoises by itself. Patches are normalised each by its own mean and deviation, as
    MAE's: raw pixels are mostly brightness, which averaging the noisy patch gives without any understanding.

    The preset for 32 pixels draws the deviation, so that clean images are among those seen, and takes the class token
    as the feature: patches keep pixels for the head, and the class token what patches tell each other.
    """

    def __init__(self, encoder: Encoder, config: Config, others: dict[str, Objective]) -> None:
        super().__init__(encoder, config.dae)
        self.requests = [
            Request(View(self.config.view, 0), noise=self.config.noise, noise_drawn=self.config.noise_drawn)
        ]
        p, q = self.patch_size
        self.head = nn.Linear(encoder.dim, p * q * encoder.channels)

    def forward(self, batch: Batch) -> Tensor:
        (request,) = self.requests
        pred = self.predict(batch.student[request])
        every = torch.ones(pred.shape[:2], device=pred.device)
        return masked_mse(pred, batch.images[request.view], every, self.patch_size, norm_pix=self.config.norm_pix)

    def predict(self, encoded: Encoded) -> Tensor:
        return self.head(encoded.patches)

    def chance(self, batch: int) -> float:
        """1: each normalised patch predicted by its mean."""
        return 1.0

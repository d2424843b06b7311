"""MAE: pixels of removed patches from the visible ones (He et al. 2021, arXiv:2111.06377)."""

from __future__ import annotations

from torch import Tensor

from hsv.config import Config
from hsv.models import Decoder, Encoder
from hsv.objectives.objective import Batch, Objective
from hsv.objectives.pixels import PixelObjective
from hsv.objectives.request import Drop, Encoded, Request, View
from hsv_kernels.distributed import masked_mse

__all__ = ["MAE"]


class MAE(PixelObjective):
    """A shallow decoder over the visible tokens of one masked view, and the mean squared error of removed patches,

        loss = mean over removed patches of ‖pred − target‖² / pixels,  target normalised per patch

    The decoder is half as deep and half as wide as published (8 blocks of 512) unless told otherwise, and learns its
    positions: it serves small encoders too.

    Beside other objectives the view is by default the first of theirs, with its colours changed: one view less to make.
    """

    def __init__(self, encoder: Encoder, config: Config, others: dict[str, Objective]) -> None:
        super().__init__(encoder, config.mae)
        self.view = View(self.config.own_view, 0)
        if others and self.config.view == "shared":
            self.view = next(iter(others.values())).requests[0].view
        self.requests = [Request(self.view, Drop(self.config.mask_ratio))]
        p, q = self.patch_size
        self.decoder = Decoder(
            encoder.dim,
            encoder.num_patches,
            dim=self.config.decoder_dim,
            depth=self.config.decoder_depth,
            heads=self.config.heads,
            out_dim=p * q * encoder.channels,
        )

    def forward(self, batch: Batch) -> Tensor:
        visible = batch.student[self.requests[0]]
        target = batch.images[self.view]
        return masked_mse(self.predict(visible), target, visible.mask, self.patch_size, norm_pix=self.config.norm_pix)

    def predict(self, encoded: Encoded) -> Tensor:
        return self.decoder(encoded.patches, encoded.ids_restore)

    def chance(self, batch: int) -> float:
        """1: each normalised patch predicted by its mean."""
        return 1.0

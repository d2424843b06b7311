"""Objectives that make pixels, and what they show of it."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from hsv.models import Encoder
from hsv.objectives.encode import Draw, encode
from hsv.objectives.objective import Objective
from hsv.objectives.request import Encoded
from hsv_kernels import denormalise_patches

__all__ = ["PixelObjective"]


class PixelConfig(Protocol):
    """What every configuration of such an objective has."""

    norm_pix: bool


class PixelObjective(Objective):
    """An objective that predicts the patches of its first request's view.

    Args:
        encoder: the shared encoder.
        config: the objective's settings, of which `norm_pix` is read.

    Raises:
        ValueError: normalised patches of one value, of which nothing is left.
    """

    def __init__(self, encoder: Encoder, config: PixelConfig) -> None:
        super().__init__()
        self.config, self.patch_size = config, encoder.patch_size
        values = math.prod(encoder.patch_size) * encoder.channels
        if config.norm_pix and values < 2:
            name = type(self).__name__.lower()
            raise ValueError(f"{name}.norm_pix: got True for patches of {values} value; allowed: False, or larger ones")

    def predict(self, encoded: Encoded) -> Tensor:
        """The encoding of a request to patches [B, L, p·q·C], normalised each if `config.norm_pix`."""
        raise NotImplementedError

    @torch.no_grad()
    def reconstruct(self, encoder: Encoder, images: Tensor, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Show what the encoder sees and what is predicted from it.

        Args:
            encoder: the shared encoder.
            images: [B, C, H, W], normalised.
            seed: of mask and noise.

        Returns:
            What the encoder sees, noise included, with removed patches zero; the same with removed patches predicted,
            or all of them if none is removed (both [B, C, H, W], normalised like the input); and the mask [B, L],
            1 = removed.
        """
        request = self.requests[0]
        encoded = encode(encoder, [request], {request.view: images}, Draw(seed, 0), {})[request]
        pred = self.predict(encoded).float()
        guess = denormalise_patches(pred, images, self.patch_size, norm_pix=self.config.norm_pix)
        seen = images if encoded.noise is None else images + encoded.noise
        if encoded.mask is None:
            return seen, guess, pred.new_zeros(pred.shape[:2])
        removed = encoded.mask[..., None].expand_as(pred).contiguous()
        removed = denormalise_patches(removed, images, self.patch_size, norm_pix=False)  # 1 on removed pixels
        return seen * (1 - removed), torch.where(removed > 0, guess, seen), encoded.mask

"""Settings of the methods that tell images, or patches, apart: SimCLR, MoCo, CPC and CAN."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from hsv.config.checks import decoder_width, positive, require, share
from hsv.data.views import SIMCLR_224, ViewSpec

__all__ = ["CANConfig", "CPCConfig", "MoCoConfig", "SimCLRConfig"]

CPC = replace(SIMCLR_224, crop_scale=(0.3, 1.0), brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, blur=0.0)


@dataclass
class SimCLRConfig:
    """Two augmented views, a projection head, NT-Xent (Chen et al. 2020)."""

    view: ViewSpec = SIMCLR_224
    """Augmentation of both views."""
    temperature: float = 0.1
    """Temperature of NT-Xent, > 0."""
    hidden_dim: int = 2048
    """Hidden width of the projection head."""
    out_dim: int = 128
    """Width of the projections that are compared."""
    pool: Literal["mean", "cls"] = "mean"
    """What the head reads: the mean of the patch tokens, or the class token."""

    def check(self, name: str) -> None:
        """Raise ValueError for the first setting that cannot work."""
        positive(f"{name}.temperature", self.temperature)
        positive(f"{name}.hidden_dim", self.hidden_dim)
        positive(f"{name}.out_dim", self.out_dim)


@dataclass
class MoCoConfig:
    """Queries against the keys of a momentum encoder: v3 (Chen et al. 2021), or v2 with a queue (Chen et al. 2020)."""

    view: ViewSpec = SIMCLR_224
    """Augmentation of both views."""
    version: Literal["v2", "v3"] = "v3"
    """`v3`: keys of the batch, both directions, a predictor; `v2`: one direction, earlier batches' keys in a queue."""
    queue_size: int = 65536
    """Keys in the queue of `v2`."""
    temperature: float = 0.2
    """Temperature of InfoNCE, > 0."""
    momentum: float = 0.99
    """Momentum of the teacher: `v3` raises it to 1 along a cosine, `v2` keeps it (published: 0.999)."""
    hidden_dim: int = 4096
    """Hidden width of projector and predictor (published for `v2`: 2048)."""
    out_dim: int = 256
    """Width of the embeddings that are compared (published for `v2`: 128)."""
    projector_layers: int | None = None
    """Layers of the projector; unset = 3 of `v3`, 2 of `v2`."""
    predictor: bool = True
    """Queries of `v3` pass a predictor of two layers."""
    freeze_patch_embed: bool = False
    """Leave the patch embedding at its random start, as published for `v3`. Off, since other objectives share it."""
    pool: Literal["mean", "cls"] = "cls"
    """What the heads read: the mean of the patch tokens, or the class token."""

    def check(self, name: str) -> None:
        """Raise ValueError for the first setting that cannot work."""
        for setting in ("queue_size", "temperature", "hidden_dim", "out_dim"):
            positive(f"{name}.{setting}", getattr(self, setting))
        positive(f"{name}.projector_layers", self.projector_layers, optional=True)
        share(f"{name}.momentum", self.momentum, whole=True)


@dataclass
class CPCConfig:
    """Rows of patches predict the rows below them (van den Oord et al. 2018, Hénaff et al. 2020)."""

    view: ViewSpec = CPC
    """Augmentation of the one view."""
    steps: int = 5
    """Rows ahead that are predicted, at most those there are."""
    temperature: float = 0.1
    """Temperature of InfoNCE, > 0."""
    hidden_dim: int = 1024
    """Hidden width of the network that embeds a patch by itself."""
    out_dim: int = 256
    """Width of the embeddings that are predicted."""
    pool: Literal["mean", "cls"] = "mean"
    """What the exported features are by default. The class token sees no patch while rows are hidden."""

    def check(self, name: str) -> None:
        """Raise ValueError for the first setting that cannot work."""
        for setting in ("steps", "temperature", "hidden_dim", "out_dim"):
            positive(f"{name}.{setting}", getattr(self, setting))


@dataclass
class CANConfig:
    """Contrast, masked reconstruction and noise prediction over two masked views (Mishra et al. 2022)."""

    view: ViewSpec = SIMCLR_224
    """Augmentation of both views."""
    mask_ratio: float = 0.5
    """Share of the patches of each view that is removed, in (0, 1)."""
    temperature: float = 0.1
    """Temperature of NT-Xent, > 0."""
    contrast_weight: float = 0.03
    """Weight of the contrast."""
    noise_weight: float = 0.3
    """Weight of the noise prediction; 0 = no noise. The reconstruction has what is left of 1."""
    noise: float = 0.05
    """Largest standard deviation of the noise, in units of the normalised image."""
    hidden_dim: int = 4096
    """Hidden width of the projection head."""
    out_dim: int = 128
    """Width of the projections that are compared."""
    norm_pix: bool = True
    """Normalise each target patch by its own mean and deviation."""
    decoder_dim: int = 512
    """Width of the decoder, with an attention head for every 32 channels."""
    decoder_depth: int = 8
    """Number of blocks of the decoder."""
    pool: Literal["mean", "cls"] = "mean"
    """What the exported features are by default: the mean of the patch tokens, or the class token."""

    def check(self, name: str) -> None:
        """Raise ValueError for the first setting that cannot work."""
        for setting in ("mask_ratio", "temperature", "noise", "hidden_dim", "out_dim", "decoder_dim", "decoder_depth"):
            positive(f"{name}.{setting}", getattr(self, setting))
        share(f"{name}.mask_ratio", self.mask_ratio)
        decoder_width(f"{name}.decoder_dim", self.decoder_dim)
        weights = self.contrast_weight, self.noise_weight
        allowed = "two numbers >= 0 whose sum is below 1"
        fine = min(weights) >= 0 and sum(weights) < 1
        require(fine, f"{name}.contrast_weight and {name}.noise_weight", weights, allowed)

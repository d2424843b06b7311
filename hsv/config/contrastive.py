"""Settings of the methods that tell images apart: SimCLR and MoCo."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hsv.config.checks import positive, share
from hsv.data.views import SIMCLR_224, ViewSpec

__all__ = ["MoCoConfig", "SimCLRConfig"]


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
    freeze_patch_embed: bool = False
    """Leave the patch embedding at its random start, as published for `v3`. Off, since other objectives share it."""
    pool: Literal["mean", "cls"] = "cls"
    """What the heads read: the mean of the patch tokens, or the class token."""

    def check(self, name: str) -> None:
        """Raise ValueError for the first setting that cannot work."""
        for setting in ("queue_size", "temperature", "hidden_dim", "out_dim"):
            positive(f"{name}.{setting}", getattr(self, setting))
        share(f"{name}.momentum", self.momentum, whole=True)

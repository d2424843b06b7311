"""Settings of the methods that fill in what was hidden: MAE, BEiT, DAE and CMAE."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from hsv.config.checks import decoder_width, positive, require, share
from hsv.data.views import MAE, ViewSpec

__all__ = ["BEiTConfig", "CMAEConfig", "DAEConfig", "MAEConfig"]

BEIT = ViewSpec(crop_scale=(0.08, 1.0), jitter_prob=1.0, brightness=0.4, contrast=0.4, saturation=0.4)
CMAE_TARGET = replace(
    MAE, shift=15, jitter_prob=0.8, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, grayscale=0.2
)


@dataclass
class MAEConfig:
    """Masked reconstruction from the visible patches (He et al. 2021)."""

    view: Literal["shared", "own"] = "shared"
    """`shared`: reconstruct the first view of the first other objective; `own`: a view of its own, after `own_view`.
    Alone, the view is always its own."""
    own_view: ViewSpec = MAE
    """Augmentation of the view of its own."""
    mask_ratio: float = 0.75
    """Share of the patches that is removed, in (0, 1)."""
    norm_pix: bool = True
    """Normalise each target patch by its own mean and deviation."""
    decoder_dim: int = 256
    """Width of the decoder."""
    decoder_depth: int = 4
    """Number of blocks of the decoder."""
    decoder_heads: int | None = None
    """Attention heads of the decoder; unset = one for every 32 channels."""
    pool: Literal["mean", "cls"] = "mean"
    """What the exported features are by default: the mean of the patch tokens, or the class token."""

    @property
    def heads(self) -> int:
        """Attention heads of the decoder."""
        return max(1, self.decoder_dim // 32) if self.decoder_heads is None else self.decoder_heads

    def check(self, name: str) -> None:
        """Raise ValueError for the first setting that cannot work."""
        positive(f"{name}.mask_ratio", self.mask_ratio)
        share(f"{name}.mask_ratio", self.mask_ratio)
        positive(f"{name}.decoder_dim", self.decoder_dim)
        positive(f"{name}.decoder_depth", self.decoder_depth)
        require(
            self.heads > 0 and self.decoder_dim % self.heads == 0,
            f"{name}.decoder_heads",
            self.heads,
            f"a divisor of {name}.decoder_dim = {self.decoder_dim}",
        )


@dataclass
class BEiTConfig:
    """Masked prediction of discrete tokens (Bao et al. 2021)."""

    view: ViewSpec = BEIT
    """Augmentation of the one view."""
    mask_ratio: float = 0.4
    """Share of the patches that the mask token replaces, in blocks."""
    tokenizer: str | None = None
    """`package.module:function` from normalised images [B, C, H, W] to int64 tokens [B, patches]; unset = a codebook of
    k-means on whitened patches, fitted before the training."""
    vocabulary: int = 512
    """Number of tokens."""
    pool: Literal["mean", "cls"] = "mean"
    """What the exported features are by default: the mean of the patch tokens, or the class token."""

    def check(self, name: str) -> None:
        """Raise ValueError for the first setting that cannot work."""
        positive(f"{name}.mask_ratio", self.mask_ratio)
        share(f"{name}.mask_ratio", self.mask_ratio, whole=True)
        require(self.vocabulary >= 2, f"{name}.vocabulary", self.vocabulary, "at least 2")
        named = self.tokenizer is None or all(self.tokenizer.partition(":"))
        require(named, f"{name}.tokenizer", self.tokenizer, "package.module:function")


@dataclass
class DAEConfig:
    """Clean pixels from a noisy image (Vincent et al. 2008)."""

    view: ViewSpec = MAE
    """Augmentation of the one view."""
    noise: float = 1.0
    """Standard deviation of the noise, in units of the normalised image."""
    noise_drawn: bool = False
    """Draw each image's deviation uniformly between 0 and `noise`, so that clean images are among those seen."""
    norm_pix: bool = True
    """Normalise each target patch by its own mean and deviation."""
    pool: Literal["mean", "cls"] = "mean"
    """What the exported features are by default: the mean of the patch tokens, or the class token."""

    def check(self, name: str) -> None:
        """Raise ValueError for the first setting that cannot work."""
        positive(f"{name}.noise", self.noise)


@dataclass
class CMAEConfig:
    """Masked reconstruction, and contrast with a momentum encoder through a decoder of features (Huang et al. 2022)."""

    view: ViewSpec = MAE
    """Augmentation of the masked view."""
    target_view: ViewSpec = CMAE_TARGET
    """Augmentation of the momentum encoder's view: of the same crop, if `crop_scale`, `crop_ratio` and `flip` agree."""
    mask_ratio: float = 0.65
    """Share of the patches that is removed, in (0, 1)."""
    norm_pix: bool = True
    """Normalise each target patch by its own mean and deviation."""
    decoder_dim: int = 512
    """Width of both decoders, with an attention head for every 32 channels."""
    decoder_depth: int = 8
    """Number of blocks of the decoder of pixels."""
    feature_depth: int = 2
    """Number of blocks of the decoder of features."""
    hidden_dim: int = 1536
    """Hidden width of projector and predictor."""
    out_dim: int = 256
    """Width of the embeddings that are compared."""
    temperature: float = 0.07
    """Temperature of InfoNCE, > 0."""
    momentum: float = 0.996
    """Momentum of the teacher at the start; it rises to 1 along a cosine."""
    pool: Literal["mean", "cls"] = "mean"
    """What the exported features are by default: the mean of the patch tokens, or the class token."""

    def check(self, name: str) -> None:
        """Raise ValueError for the first setting that cannot work."""
        for setting in ("mask_ratio", "decoder_depth", "feature_depth", "hidden_dim", "out_dim", "temperature"):
            positive(f"{name}.{setting}", getattr(self, setting))
        share(f"{name}.mask_ratio", self.mask_ratio)
        share(f"{name}.momentum", self.momentum, whole=True)
        decoder_width(f"{name}.decoder_dim", self.decoder_dim)

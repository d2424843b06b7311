"""Settings of the methods that fill in what was hidden: MAE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hsv.config.checks import positive, require, share
from hsv.data.views import MAE, ViewSpec

__all__ = ["MAEConfig"]


@dataclass
class MAEConfig:
    """Masked reconstruction from the visible patches (He et al. 2021)."""

    view: Literal["shared", "own"] = "shared"
    """`shared`: reconstruct the first view of the first other objective; `own`: a view of its own, after `own_view`.
    Alone, the view is always its own."""
    own_view: ViewSpec = MAE
    """Augmentation of the view of its own."""
    mask_ratio: float = 0.75
    """Share of the patches that is removed, in [0, 1)."""
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
        share(f"{name}.mask_ratio", self.mask_ratio)
        positive(f"{name}.decoder_dim", self.decoder_dim)
        positive(f"{name}.decoder_depth", self.decoder_depth)
        require(
            self.heads > 0 and self.decoder_dim % self.heads == 0,
            f"{name}.decoder_heads",
            self.heads,
            f"a divisor of {name}.decoder_dim = {self.decoder_dim}",
        )

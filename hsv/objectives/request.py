"""What an objective asks of a batch. Equal requests are served once, however many objectives make them."""

from __future__ import annotations

from dataclasses import dataclass, fields

from torch import Tensor

from hsv.data.views import ViewSpec
from hsv.models.encoder import Encoding

__all__ = ["Causal", "Drop", "Encoded", "Replace", "Request", "View"]


@dataclass(frozen=True)
class View:
    """An augmentation drawn in a slot: the same `spec` in another slot is an independent draw."""

    spec: ViewSpec
    slot: int


@dataclass(frozen=True)
class Drop:
    """Random removal of a share `ratio` of the patches, before they are embedded."""

    ratio: float


@dataclass(frozen=True)
class Replace:
    """The mask token of the objective `owner` in place of some patches, which ones being the objective's choice."""

    owner: str


@dataclass(frozen=True)
class Causal:
    """Every patch kept, but each sees only the class token and the patches of its own and earlier rows."""


@dataclass(frozen=True)
class Request:
    """The encoding of a view, whole or masked, of its pixels or of pixels with Gaussian noise.

    noise: largest standard deviation of the noise, in units of the normalised image.
    noise_drawn: each image's deviation is uniform in [0, noise] instead of `noise`.
    """

    view: View
    mask: Drop | Replace | Causal | None = None
    noise: float = 0.0
    noise_drawn: bool = False


@dataclass
class Encoded(Encoding):
    """The encoding of a request, and what was done to its images on the way.

    Attributes:
        ids_restore: int64 [B, L], the place of each patch in [kept, removed] (Drop).
        mask: [B, L], 1 = removed or replaced (Drop, Replace).
        embedded: [B, L, D], patches before position and attention (Causal).
        noise: [B, C, H, W], what was added to the normalised image.
        noise_level: [B], its standard deviation.
    """

    ids_restore: Tensor | None = None
    mask: Tensor | None = None
    embedded: Tensor | None = None
    noise: Tensor | None = None
    noise_level: Tensor | None = None

    def no_images(self) -> Encoded:
        """The first 0 rows of every tensor, on its graph."""
        return Encoded(*(None if x is None else x[:0] for x in (getattr(self, f.name) for f in fields(self))))

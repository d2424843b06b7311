"""What an objective asks of a batch. Equal requests are served once, however many objectives make them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hsv.data.views import ViewSpec
from hsv.models.encoder import Encoding

__all__ = ["Mask", "Masked", "Request", "View"]


@dataclass(frozen=True)
class View:
    """An augmentation drawn in a slot: the same `spec` in another slot is an independent draw."""

    spec: ViewSpec
    slot: int


@dataclass(frozen=True)
class Mask:
    """Random removal of a share `ratio` of the patches, before they are embedded."""

    ratio: float


@dataclass(frozen=True)
class Request:
    """The encoding of a view, whole or masked."""

    view: View
    mask: Mask | None = None


@dataclass
class Masked(Encoding):
    """The encoding of the visible patches, with `ids_restore` [B, L] int64 and `mask` [B, L] (1 = removed)."""

    ids_restore: Tensor
    mask: Tensor

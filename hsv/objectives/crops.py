"""Small crops beside the large ones (multi-crop, Caron et al. 2020)."""

from __future__ import annotations

from dataclasses import replace

from hsv.data.views import ViewSpec
from hsv.models import Encoder
from hsv.objectives.request import Request, View

__all__ = ["local_requests"]

RATIO = 3 / 7  # 96 of 224 pixels


def local_requests(encoder: Encoder, spec: ViewSpec, count: int) -> list[Request]:
    """Requests for `count` small crops after `spec`, in slots after the two large ones.

    Without a size of its own a crop has 3/7 of the image's shorter side, rounded to whole patches.
    """
    patch = max(encoder.patch_size)
    size = spec.size or max(patch, round(min(encoder.image_size) * RATIO / patch) * patch)
    if any(size % side for side in encoder.patch_size):
        raise ValueError(f"size of small crops: got {size}; allowed: multiples of the patch, {encoder.patch_size}")
    return [Request(View(replace(spec, size=size), 2 + number)) for number in range(count)]

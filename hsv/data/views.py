"""What a view of an image is, and its geometric half: crop, flip and shift, done in the data workers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from PIL import Image

from hsv.data.hashing import Stream, uniform

__all__ = ["MAE", "SIMCLR_224", "ViewSpec", "centre_view", "make_views"]

CROP_TRIES = 10
REDUCING_GAP = 3.0  # crops six times as large as the view are first averaged down to three times its size
GEOMETRY_NUMBERS = 2 * CROP_TRIES + 5


@dataclass(frozen=True)
class ViewSpec:
    """How a random view is made. Equal specifications are equal objects, so they can key a dictionary.

    The geometric part (crop_scale to shift) is done by `make_views`, the colour part by `photometric`, in the
    order jitter, grey, blur, solarise. The defaults leave the colours alone.

    Attributes:
        crop_scale: smallest and largest area of the crop, as a fraction of the image's.
        crop_ratio: smallest and largest width / height of the crop, drawn uniformly in the logarithm.
        flip: probability of a horizontal flip.
        shift: largest displacement in pixels of the view, along both axes; the border is repeated.
        jitter_prob: probability that brightness, contrast, saturation and hue are changed at all.
        brightness: b: factor in [max(0, 1 − b), 1 + b].
        contrast: c: factor in [max(0, 1 − c), 1 + c] on the distance from the mean grey.
        saturation: s: factor in [max(0, 1 − s), 1 + s] on the distance from each pixel's grey.
        hue: largest turn of the hue, as a fraction of the colour circle, at most 0.5.
        grayscale: probability of grey.
        blur: probability of a Gaussian blur.
        blur_sigma: its smallest and largest standard deviation in pixels.
        solarize: probability that values of 0.5 and more are inverted.
        size: side of the view in pixels; None = that of the other images of the run.
    """

    crop_scale: tuple[float, float] = (0.2, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    shift: int = 0
    jitter_prob: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    grayscale: float = 0.0
    blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize: float = 0.0
    size: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            if isinstance(getattr(self, field.name), list):  # as YAML gives them; lists cannot be hashed
                object.__setattr__(self, field.name, tuple(getattr(self, field.name)))
        for name in ("flip", "jitter_prob", "grayscale", "blur", "solarize"):
            self._check(name, 0 <= getattr(self, name) <= 1, "a probability in [0, 1]")
        for name in ("brightness", "contrast", "saturation"):
            self._check(name, getattr(self, name) >= 0, "numbers >= 0")
        self._check("hue", 0 <= self.hue <= 0.5, "in [0, 0.5]")
        self._check("size", self.size is None or (self.size >= 1 and self.size == int(self.size)), "at least 1 pixel")
        whole = self.shift >= 0 and self.shift == int(self.shift)
        self._check("shift", whole, "a whole number of pixels, at least 0")
        for name, top in (("crop_scale", 1.0), ("crop_ratio", math.inf), ("blur_sigma", math.inf)):
            pair = getattr(self, name)
            good = len(pair) == 2 and 0 < pair[0] <= pair[1] <= top and math.isfinite(pair[1])
            self._check(name, good, f"a pair 0 < smallest <= largest{' <= 1' if top == 1 else ''}")

    def _check(self, name: str, good: bool, allowed: str) -> None:
        if not good:
            raise ValueError(f"{name}: got {getattr(self, name)!r}; allowed: {allowed}")


SIMCLR_224 = ViewSpec(
    crop_scale=(0.08, 1.0),
    jitter_prob=0.8,
    brightness=0.8,
    contrast=0.8,
    saturation=0.8,
    hue=0.2,
    grayscale=0.2,
    blur=0.5,
)
"""SimCLR's views at 224 pixels (Chen et al. 2020, strength 1)."""

MAE = ViewSpec()
"""MAE's views: crop and flip (He et al. 2021)."""


def make_views(
    images: Sequence[Image.Image],
    indices: np.ndarray,
    spec: ViewSpec,
    size: tuple[int, int],
    key: Sequence[int],
) -> np.ndarray:
    """Crop (antialiased, bicubic), resize, flip and shift each image.

    Args:
        images: B pictures of one mode, "L" or "RGB", of any sizes.
        indices: int64 [B], the images' numbers in their source.
        spec: the view.
        size: (height, width) of the views in pixels.
        key: integers, such as (seed, epoch, slot). With the index they determine everything that is random.

    Returns:
        uint8 [B, H, W, C].
    """
    height, width = size
    numbers = uniform((Stream.CROP, *key), indices, GEOMETRY_NUMBERS)
    views = []
    for image, row in zip(images, numbers[:, : 2 * CROP_TRIES + 2].tolist(), strict=True):
        box = crop_box(*image.size, spec, row)
        views.append(as_array(image.resize((width, height), Image.Resampling.BICUBIC, box, REDUCING_GAP)))
    views = np.stack(views)
    flipped = numbers[:, -1] < spec.flip
    views[flipped] = views[flipped, :, ::-1]
    return shift(views, spec.shift, numbers[:, -3:-1]) if spec.shift else views


def crop_box(width: int, height: int, spec: ViewSpec, numbers: Sequence[float]) -> tuple[float, float, float, float]:
    """A random box (left, top, right, bottom), in pixels that need not be whole.

    Area and ratio are drawn until the box fits, ten times; then it is the largest box of an allowed ratio,
    centred (as in Szegedy et al. 2015).

    Args:
        numbers: uniform, 2 for the place and 2 for each try.
    """
    low, high = spec.crop_scale
    log_low, log_high = math.log(spec.crop_ratio[0]), math.log(spec.crop_ratio[1])
    for i in range(2, len(numbers), 2):
        area = width * height * (low + (high - low) * numbers[i])
        ratio = math.exp(log_low + (log_high - log_low) * numbers[i + 1])
        w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if w <= width and h <= height:
            left, top = (width - w) * numbers[0], (height - h) * numbers[1]
            return left, top, min(left + w, width), min(top + h, height)
    ratio = min(max(width / height, spec.crop_ratio[0]), spec.crop_ratio[1])
    return centre_box(width, height, ratio)


def centre_box(width: int, height: int, ratio: float) -> tuple[float, float, float, float]:
    """The largest box with this width / height, in the middle."""
    w, h = min(width, height * ratio), min(height, width / ratio)
    left, top = (width - w) / 2, (height - h) / 2
    return left, top, left + w, top + h


def shift(views: np.ndarray, most: int, numbers: np.ndarray) -> np.ndarray:
    """Displace each view by a whole number of pixels in [−most, most] per axis, repeating the border.

    Args:
        views: uint8 [B, H, W, C].
        numbers: uniform [B, 2].
    """
    B, H, W, _ = views.shape
    by = np.floor(numbers * (2 * most + 1)).astype(np.int64) - most
    rows = np.clip(np.arange(H) - by[:, :1], 0, H - 1)  # [B, H]
    columns = np.clip(np.arange(W) - by[:, 1:], 0, W - 1)  # [B, W]
    return views[np.arange(B)[:, None, None], rows[:, :, None], columns[:, None, :]]


def centre_view(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """The view for evaluation: resized (antialiased, bicubic) until it just covers `size`, then cropped.

    An image that has this size already is returned as it is.

    Returns:
        uint8 [H, W, C].
    """
    height, width = size
    if image.size != (width, height):
        box = centre_box(*image.size, width / height)
        image = image.resize((width, height), Image.Resampling.BICUBIC, box)
    return as_array(image)


def as_array(image: Image.Image) -> np.ndarray:
    """uint8 [H, W, C] of a picture of mode "L" or "RGB"."""
    pixels = np.asarray(image)
    return pixels if pixels.ndim == 3 else pixels[:, :, None]

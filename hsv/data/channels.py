"""Any picture as 8-bit RGB or grey."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps

__all__ = ["check_channels", "to_channels"]

MODES = {1: "L", 3: "RGB"}


def check_channels(channels: int) -> None:
    """Raise ValueError unless `channels` is 1 or 3."""
    if channels not in MODES:
        raise ValueError(f"channels: got {channels!r}; allowed: 1 (grey) or 3 (RGB)")


def to_channels(image: Image.Image | np.ndarray, channels: int) -> Image.Image:
    """Convert a picture to mode "RGB" (3) or "L" (1), 8 bits per channel.

    Grey is replicated, alpha is laid over white, palettes and CMYK are converted, 16-bit and floating-point
    values are scaled to 0–255 and the EXIF orientation is applied.

    Args:
        image: any PIL picture, or a uint8 array [H, W], [H, W, 1] or [H, W, 3].
        channels: 1 or 3.
    """
    check_channels(channels)
    if isinstance(image, np.ndarray):
        image = from_array(image)
    image = upright(image)
    if image.mode.startswith(("I", "F")):
        image = Image.fromarray(scale_to_bytes(np.asarray(image), image.mode))
    elif image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = over_white(image)
    if image.mode == MODES[channels]:
        return image
    if image.mode not in ("L", "RGB", "1"):  # CMYK and P reach grey only through RGB without surprises
        image = image.convert("RGB")
    return image.convert(MODES[channels])


def from_array(pixels: np.ndarray) -> Image.Image:
    """uint8 [H, W], [H, W, 1] or [H, W, 3] as a picture of mode "L" or "RGB"."""
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if pixels.dtype != np.uint8 or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)):
        raise ValueError(
            f"image: got {pixels.dtype} {list(pixels.shape)}; allowed: uint8 [H, W], [H, W, 1] or [H, W, 3]"
        )
    return Image.fromarray(pixels)


def upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation; an unreadable EXIF block counts as none."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a damaged tag must not cost the picture
        return image


def scale_to_bytes(values: np.ndarray, mode: str) -> np.ndarray:
    """Grey values of more than 8 bits [H, W] → uint8 [H, W].

    Integers fill 16 bits (32 if a value exceeds them); floating-point values fill the smallest of [0, 1],
    [0, 255] and [0, 65535] that holds their maximum. NaN becomes 0.
    """
    values = np.nan_to_num(values.astype(np.float64))
    largest = values.max(initial=0.0)
    ranges = (1.0, 255.0, 65535.0) if mode.startswith("F") else (65535.0, 2.0**31 - 1)
    full = next((r for r in ranges if largest <= r), largest)
    return np.clip(np.rint(values * (255.0 / full)), 0, 255).astype(np.uint8)


def over_white(image: Image.Image) -> Image.Image:
    """Lay a picture with transparency over a white ground: mode "RGB"."""
    image = image.convert("RGBA")
    ground = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(ground, image).convert("RGB")

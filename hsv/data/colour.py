"""The colour half of a view, for a whole batch at once and on its device."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hsv.data.hashing import Stream, uniform
from hsv.data.views import ViewSpec

__all__ = ["normalise", "photometric"]

CHUNK = 2**18
GREY = (0.299, 0.587, 0.114)


@torch.no_grad()
def photometric(
    views: Tensor,
    spec: ViewSpec,
    key: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """Change the colours of a batch at random, then normalise it.

    Each image draws its own strengths; the order of brightness, contrast, saturation and hue is drawn once
    for the batch. Each operation is torchvision's of that name on float images and keeps values in [0, 1].
    Saturation, hue and grey are left out when there are not three channels.

    Args:
        views: uint8 [B, C, H, W].
        spec: the view.
        key: integers such as (seed, step, slot), with the rank appended where there are several: they
            determine all that is random.
        mean, std: C values each, in units of [0, 1].

    Returns:
        float32 [B, C, H, W]: (colour / 255 − mean) / std.
    """
    if views.dtype != torch.uint8 or views.ndim != 4:
        raise ValueError(f"views: got {views.dtype} {list(views.shape)}; allowed: uint8 [B, C, H, W]")
    B, C, H, W = views.shape
    draws = draw(spec, key, B, C)
    order = [name for name in uniform_order((Stream.COLOUR, *key)) if name in draws]
    scale, offset = affine(views, mean, std)
    # Caches are small on a CPU and launches dear on a GPU: chunks that fit the former, one for the latter.
    chunk = max(1, CHUNK // (C * H * W)) if views.device.type == "cpu" else max(B, 1)
    out = torch.empty(B, C, H, W, dtype=torch.float32, device=views.device)
    with torch.autocast(views.device.type, enabled=False):
        for start in range(0, B, chunk):
            rows = slice(start, start + chunk)
            x = recolour(views[rows].float().mul_(1 / 255), {k: v[rows] for k, v in draws.items()}, order)
            torch.addcmul(offset, x, scale, out=out[rows])
    return out


def normalise(views: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 [B, C, H, W] → float32 (views / 255 − mean) / std."""
    scale, offset = affine(views, mean, std)
    return torch.addcmul(offset, views.float().mul_(1 / 255), scale)


def affine(views: Tensor, mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
    """scale and offset [1, C, 1, 1] with (x − mean) / std = x · scale + offset."""
    C = views.shape[1]
    if len(mean) != C or len(std) != C or not min(std) > 0:
        raise ValueError(f"mean, std: got {mean!r}, {std!r}; allowed: {C} values each, std > 0")
    m = torch.tensor(mean, dtype=torch.float64).view(1, C, 1, 1)
    s = torch.tensor(std, dtype=torch.float64).view(1, C, 1, 1)
    return tuple(t.float().to(views.device, non_blocking=True) for t in (1 / s, -m / s))


def draw(spec: ViewSpec, key: Sequence[int], B: int, C: int) -> dict[str, np.ndarray]:
    """Strengths of the operations that this specification uses, float64 [B] each; see `recolour`."""
    u = uniform((Stream.COLOUR, *key), np.arange(B), 9)
    jitter = u[:, 0] < spec.jitter_prob
    draws = {}
    for i, name in enumerate(("brightness", "contrast", "saturation"), start=1):
        strength = getattr(spec, name)
        if strength > 0 and spec.jitter_prob > 0:
            low = max(0.0, 1 - strength)
            draws[name] = np.where(jitter, low + (1 + strength - low) * u[:, i], 1.0)
    if spec.hue > 0 and spec.jitter_prob > 0:
        draws["hue"] = np.where(jitter, spec.hue * (2 * u[:, 4] - 1), 0.0)
    if spec.grayscale > 0:
        draws["grey"] = u[:, 5] < spec.grayscale
    if spec.blur > 0:
        low, high = spec.blur_sigma
        draws["blur"] = np.where(u[:, 6] < spec.blur, low + (high - low) * u[:, 7], 0.0)
    if spec.solarize > 0:
        draws["solarise"] = u[:, 8] < spec.solarize
    return draws if C == 3 else {k: v for k, v in draws.items() if k not in ("saturation", "hue", "grey")}


def uniform_order(key: Sequence[int]) -> list[str]:
    """The four jitter operations in random order."""
    names = ("brightness", "contrast", "saturation", "hue")
    return [names[i] for i in np.argsort(uniform(key, np.array([-1]), 4)[0])]


def recolour(x: Tensor, draws: dict[str, np.ndarray], order: Sequence[str]) -> Tensor:
    """Apply the drawn operations to x float32 [B, C, H, W] in [0, 1], which is overwritten."""
    for name in order:
        strength = column(draws[name], x)
        x = JITTER[name](x, strength)
    for name, operation in (("grey", to_grey), ("blur", blur), ("solarise", solarise)):
        chosen = np.flatnonzero(draws[name]) if name in draws else ()
        if len(chosen):
            rows = torch.from_numpy(chosen).to(x.device, non_blocking=True)
            part = x.index_select(0, rows)
            part = operation(part, draws[name][chosen]) if name == "blur" else operation(part)
            x.index_copy_(0, rows, part)
    return x


def column(values: np.ndarray, like: Tensor) -> Tensor:
    """[B] → float32 [B, 1, 1, 1] on the device of `like`."""
    return torch.from_numpy(values.astype(np.float32)).view(-1, 1, 1, 1).to(like.device, non_blocking=True)


def luminance(x: Tensor) -> Tensor:
    """[B, 3, H, W] → [B, 1, H, W]; one channel is its own."""
    if x.shape[1] == 1:
        return x
    red, green, blue = x.split(1, dim=1)
    return (red * GREY[0]).add_(green, alpha=GREY[1]).add_(blue, alpha=GREY[2])


def change_brightness(x: Tensor, factor: Tensor) -> Tensor:
    """x · factor."""
    return x.mul_(factor).clamp_(0, 1)


def change_contrast(x: Tensor, factor: Tensor) -> Tensor:
    """m + (x − m) · factor with m the image's mean luminance."""
    grey = luminance(x).mean(dim=(1, 2, 3), keepdim=True)
    return x.mul_(factor).add_(grey * (1 - factor)).clamp_(0, 1)


def change_saturation(x: Tensor, factor: Tensor) -> Tensor:
    """y + (x − y) · factor with y each pixel's luminance."""
    grey = luminance(x).mul_(1 - factor)
    return x.mul_(factor).add_(grey).clamp_(0, 1)


def turn_hue(x: Tensor, turn: Tensor) -> Tensor:
    """Add `turn` (of a full circle) to the hue in HSV, saturation and value unchanged.

    With v the largest channel, c the chroma and h ∈ [0, 6) the hue:
    red = v − c + c·clamp(|h − 3| − 1), green = v − c + c·clamp(2 − |h − 2|),
    blue = v − c + c·clamp(2 − |h − 4|), all clamped to [0, 1].
    """
    red, green, blue = x.split(1, dim=1)
    high = torch.maximum(torch.maximum(red, green), blue)
    low = torch.minimum(torch.minimum(red, green), blue)
    chroma = high - low
    per = chroma.clamp_min(1e-12).reciprocal_()
    hue = torch.where(
        high == red,
        (green - blue).mul_(per),
        torch.where(high == green, (blue - red).mul_(per).add_(2), (red - green).mul_(per).add_(4)),
    )
    hue.add_(turn * 6)
    hue.sub_((hue * (1 / 6)).floor_().mul_(6))
    torch.sub(hue, 3, out=red).abs_().sub_(1)
    torch.sub(hue, 2, out=green).abs_().neg_().add_(2)
    torch.sub(hue, 4, out=blue).abs_().neg_().add_(2)
    return x.clamp_(0, 1).mul_(chroma).add_(low)


def to_grey(x: Tensor) -> Tensor:
    """Luminance in all three channels."""
    return luminance(x).expand_as(x)


def blur(x: Tensor, sigma: np.ndarray) -> Tensor:
    """Gaussian blur with reflected borders, a standard deviation [B] per image in pixels, cut off after four.

    One axis after the other: out_i = Σ_k w_|k| · x_{i+k}, with w_k ∝ exp(−k² / 2σ²).
    """
    reach = min(math.ceil(4 * sigma.max()), min(x.shape[2:]) - 1)
    weights = np.exp(-0.5 * (np.arange(reach + 1)[:, None] / sigma) ** 2)  # [reach + 1, B]
    weights /= weights[0] + 2 * weights[1:].sum(0)
    taps = [column(row, x) for row in weights]
    return smooth(smooth(x, taps, 2), taps, 3)


def smooth(x: Tensor, taps: Sequence[Tensor], axis: int) -> Tensor:
    """Convolve with symmetric taps along an axis: taps[k] [B, 1, 1, 1] weighs both neighbours at distance k."""
    reach, size = len(taps) - 1, x.shape[axis]
    padding = [0, 0, reach, reach] if axis == 2 else [reach, reach, 0, 0]
    padded = F.pad(x, padding, mode="reflect") if reach else x
    out = padded.narrow(axis, reach, size) * taps[0]
    for k in range(1, reach + 1):
        pair = padded.narrow(axis, reach - k, size) + padded.narrow(axis, reach + k, size)
        out.addcmul_(pair, taps[k])
    return out


def solarise(x: Tensor) -> Tensor:
    """1 − x where x ≥ 0.5."""
    return torch.minimum(x, 1 - x)


JITTER = {
    "brightness": change_brightness,
    "contrast": change_contrast,
    "saturation": change_saturation,
    "hue": turn_hue,
}

"""Features of every image of a source, from an encoder or from its raw pixels."""

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

__all__ = ["Features", "extract_features", "pixel_features"]


class FeatureEncoder(Protocol):
    """What extraction asks of an encoder; `hsv.models.encoder.Encoder` has it."""

    image_size: int | tuple[int, int]
    channels: int
    mean: Any  # one value per channel, of pixels in [0, 1]
    std: Any

    def features(self, images: Tensor, pool: str = "mean") -> Tensor: ...


@dataclass(frozen=True)
class Features:
    """Features of n images, in the order of the source, files that could not be decoded left out.

    x: [n, D] float32 on the CPU. indices: [n] int64, positions in the source. labels: [n] int64 or None.
    names: n file or record names. failures: (name, reason) of each image that was left out.
    """

    x: Tensor
    indices: Tensor
    labels: Tensor | None
    names: list[str]
    failures: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.x)


def extract_features(
    encoder: FeatureEncoder,
    source: Any,
    *,
    pool: str = "mean",
    batch_size: int = 256,
    workers: int = 0,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> Features:
    """Features of every image of `source` (`hsv.data.Source`), in float32 and without gradient.

    pool: "mean" of the normalised patch tokens, or "cls". The encoder is moved to `device`, set to eval mode
    while this runs and given back in its former mode. progress: a bar on stderr.
    """
    if pool not in ("mean", "cls"):
        raise ValueError(f"pool: {pool!r} given; 'mean' and 'cls' are allowed")
    encoder = encoder.to(device)
    mean, std = (
        torch.as_tensor(value, dtype=torch.float32, device=device).reshape(1, -1, 1, 1)
        for value in (encoder.mean, encoder.std)
    )

    def features(images: Tensor) -> Tensor:
        return encoder.features((images.to(device).float() / 255 - mean) / std, pool=pool)

    training = encoder.training
    encoder.eval()
    try:
        with torch.no_grad():
            return _collect(features, source, encoder.image_size, encoder.channels, batch_size, workers, progress)
    finally:
        encoder.train(training)


def pixel_features(
    source: Any,
    *,
    image_size: int | tuple[int, int],
    channels: int = 3,
    max_side: int = 32,
    batch_size: int = 256,
    workers: int = 0,
) -> Features:
    """Raw pixels in [0, 1] as features [n, C·H·W], the floor that any encoder should beat.

    max_side: larger images are scaled down to this many pixels on the longer side, with antialiasing.
    """

    def features(images: Tensor) -> Tensor:
        images = images.float() / 255
        height, width = images.shape[-2:]
        scale = min(1.0, max_side / max(height, width))
        if scale < 1:
            size = (max(1, round(height * scale)), max(1, round(width * scale)))
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        return images.flatten(1)

    with torch.no_grad():
        return _collect(features, source, image_size, channels, batch_size, workers, progress=False)


def _collect(features, source, image_size, channels, batch_size, workers, progress) -> Features:
    from hsv.data import plain_batches

    x, indices, failures = [], [], []
    batches = plain_batches(source, image_size=image_size, channels=channels, batch_size=batch_size, workers=workers)
    with tqdm(total=len(source), desc="features", unit="img", disable=not progress, leave=False) as bar:
        for index, images, broken in batches:
            failures += broken
            if len(index):
                x.append(features(torch.as_tensor(images)).float().cpu())
                indices.append(torch.as_tensor(np.asarray(index), dtype=torch.int64))
            bar.update(len(index) + len(broken))
    if not x:
        reason = f"; the first: {failures[0][0]}: {failures[0][1]}" if failures else ""
        raise ValueError(f"source: none of {len(source)} images could be read{reason}")
    order = torch.cat(indices)
    labels = None if source.labels is None else torch.as_tensor(np.asarray(source.labels))[order].to(torch.int64)
    return Features(torch.cat(x), order, labels, [source.name(int(i)) for i in order], failures)

"""Features of every image of a source, from an encoder or from its raw pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hsv.bar import progress_bar
from hsv.data import Source, normalise, plain_batches

if TYPE_CHECKING:
    from hsv.models import Encoder

__all__ = ["Features", "extract_features", "pixel_features"]


@dataclass(frozen=True)
class Features:
    """Features of n images, in the order of the source; files that could not be decoded are left out.

    Attributes:
        x: [n, D] float32, on the CPU.
        indices: int64 [n], positions in the source.
        labels: int64 [n], or None.
        names: n file or record names.
        failures: (name, reason) of each image that was left out.
    """

    x: Tensor
    indices: Tensor
    labels: Tensor | None
    names: list[str]
    failures: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.x)

    def take(self, rows: Tensor) -> Features:
        """The features of some rows."""
        labels = None if self.labels is None else self.labels[rows]
        return Features(self.x[rows], self.indices[rows], labels, [self.names[i] for i in rows.tolist()])


def extract_features(
    encoder: Encoder,
    source: Source,
    *,
    pool: Literal["mean", "cls"] | None = None,
    batch_size: int = 256,
    workers: int = 0,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> Features:
    """Features of every image, in float32 and without gradient.

    Args:
        encoder: is moved to `device`, put in evaluation mode while this runs and given back in its former mode.
        source: where the images come from.
        pool: `mean` of the normalised patch tokens, or `cls`; None = the encoder's own.
        batch_size: images encoded at a time.
        workers: processes that decode images.
        device: where the encoder runs.
        progress: show a bar on stderr.

    Raises:
        ValueError: another pool, or no image can be decoded.
    """
    if pool not in (None, "mean", "cls"):
        raise ValueError(f"pool: got {pool!r}; allowed: 'mean', 'cls' or None")
    encoder = encoder.to(device)

    def features(images: Tensor) -> Tensor:
        return encoder.features(normalise(images.to(device), encoder.mean, encoder.std), pool)

    training = encoder.training
    encoder.eval()
    try:
        return _collect(features, source, encoder.image_size, encoder.channels, batch_size, workers, progress)
    finally:
        encoder.train(training)


def pixel_features(
    source: Source,
    *,
    image_size: int | tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    max_side: int = 32,
    batch_size: int = 256,
    workers: int = 0,
) -> Features:
    """Normalised pixels as features [n, C·H·W], the floor that any encoder should beat.

    Args:
        source: where the images come from.
        image_size: that of the encoder to compare with, in pixels.
        mean, std: of each channel, in [0, 1]; their number is that of the channels, 1 or 3.
        max_side: larger images are scaled down to this many pixels on the longer side, with antialiasing.
        batch_size: images at a time.
        workers: processes that decode images.
    """

    def features(images: Tensor) -> Tensor:
        images = normalise(images, mean, std)
        height, width = images.shape[-2:]
        scale = min(1.0, max_side / max(height, width))
        if scale < 1:
            size = (max(1, round(height * scale)), max(1, round(width * scale)))
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        return images.flatten(1)

    return _collect(features, source, image_size, len(mean), batch_size, workers, progress=False)


@torch.no_grad()
def _collect(
    features: Callable[[Tensor], Tensor],
    source: Source,
    image_size: int | tuple[int, int],
    channels: int,
    batch_size: int,
    workers: int,
    progress: bool,
) -> Features:
    x, indices, failures = [], [], []
    batches = plain_batches(source, image_size=image_size, channels=channels, batch_size=batch_size, workers=workers)
    with progress_bar(total=len(source), desc="features", unit=" images", disable=not progress, leave=False) as bar:
        for index, images, broken in batches:
            failures += broken
            if len(index):
                x.append(features(images).float().cpu())
                indices.append(index.cpu())
            bar.update(len(index) + len(broken))
    if not x:
        reason = f"; the first: {failures[0][0]}: {failures[0][1]}" if failures else ""
        raise ValueError(f"source: none of {len(source)} images could be decoded{reason}")
    order = torch.cat(indices)
    labels = None if source.labels is None else torch.from_numpy(source.labels)[order]
    return Features(torch.cat(x), order, labels, [source.name(i) for i in order.tolist()], failures)

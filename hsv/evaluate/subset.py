"""Some images of a source, as a source."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from hsv.data import Source

__all__ = ["Subset"]


class Subset(Source):
    """Images `indices` of `source`, in that order, with their names and labels."""

    def __init__(self, source: Source, indices: Sequence[int]) -> None:
        self.source, self.indices = source, [int(i) for i in indices]
        self.labels = None if source.labels is None else source.labels[self.indices]
        self.classes = source.classes

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return self.source.name(self.indices[index])

    def read(self, index: int, min_side: int | None = None) -> Image.Image | np.ndarray:
        return self.source.read(self.indices[index], min_side)

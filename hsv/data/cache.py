"""Reading an image as RGB or grey, and keeping what was decoded where memory allows."""

from __future__ import annotations

import mmap

import numpy as np
from PIL import Image

from hsv.data.channels import to_channels
from hsv.data.decode import UndecodableImage, reason_of
from hsv.data.sources import ArraySource, Source

__all__ = ["ImageReader", "read_image"]

CACHE_LIMIT = 512 * 2**20
PROBES = 16


def read_image(source: Source, index: int, channels: int, min_side: int | None = None) -> Image.Image:
    """One image in mode "RGB" or "L".

    Raises:
        UndecodableImage: it cannot be read, decoded or converted.
    """
    image = source.read(index, min_side)
    try:
        return to_channels(image, channels)
    except Exception as error:  # as in decode: PIL's converters raise nearly anything
        raise UndecodableImage(source.name(index), reason_of(error)) from error


class ImageReader:
    """Reads the images of a source, decoding each once if all of them, decoded, fit in `limit` bytes.

    What was decoded lies in memory that forked workers share; a slot belongs to one image, and two workers
    that decode the same one write the same bytes. An image larger than the few looked at in the beginning is
    decoded each time.

    Args:
        source: the images.
        channels: 1 or 3.
        min_side: see `decode`.
        limit: bytes.
    """

    def __init__(self, source: Source, channels: int, min_side: int | None = None, limit: int = CACHE_LIMIT) -> None:
        self.source = source
        self.channels = channels
        self.min_side = min_side
        self.slot = 0 if isinstance(source, ArraySource) else slot_bytes(source, channels, min_side)
        if self.slot * len(source) > limit:
            self.slot = 0
        self._allocate()

    def _allocate(self) -> None:
        if self.slot:
            N = len(self.source)
            self.sizes = np.frombuffer(mmap.mmap(-1, 8 * N), dtype=np.int32).reshape(N, 2)
            self.pixels = np.frombuffer(mmap.mmap(-1, self.slot * N), dtype=np.uint8).reshape(N, self.slot)

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k not in ("sizes", "pixels")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._allocate()

    def __call__(self, index: int) -> Image.Image:
        """Image `index` in mode "RGB" or "L"; raises UndecodableImage."""
        if self.slot and self.sizes[index, 0]:
            width, height = self.sizes[index]
            shape = (height, width) if self.channels == 1 else (height, width, self.channels)
            return Image.fromarray(self.pixels[index, : width * height * self.channels].reshape(shape))
        image = read_image(self.source, index, self.channels, self.min_side)
        if self.slot and image.width * image.height * self.channels <= self.slot:
            values = np.asarray(image).reshape(-1)
            self.pixels[index, : len(values)] = values
            self.sizes[index, 1] = image.height
            self.sizes[index, 0] = image.width  # written last: it marks the slot as filled
        return image


def slot_bytes(source: Source, channels: int, min_side: int | None) -> int:
    """Bytes of the largest of a few images spread over the source; 0 if none of them can be read."""
    largest = 0
    for index in sorted({i * len(source) // PROBES for i in range(PROBES)}):
        try:
            image = read_image(source, index, channels, min_side)
        except UndecodableImage:
            continue
        largest = max(largest, image.width * image.height * channels)
    return largest

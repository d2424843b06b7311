"""From the bytes of a file to a loaded picture, or to one error that names the file."""

from __future__ import annotations

import functools
import io
import os
from pathlib import Path
from typing import BinaryIO

from PIL import Image

__all__ = ["IMAGE_EXTENSIONS", "UndecodableImage", "decode", "is_image_name", "printable", "reason_of"]

# fmt: off
IMAGE_EXTENSIONS = frozenset((
    ".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm",
    ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp",
))
# fmt: on
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP")


class UndecodableImage(Exception):
    """A file that is not a readable picture.

    Attributes:
        name: the file (relative path, or shard and member).
        reason: what the decoder said, in one line.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)  # both arguments, so that the exception survives pickling
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def is_image_name(name: str) -> bool:
    """Whether a file name has an extension of a common image format and is not a hidden file."""
    path = Path(name)
    return path.suffix.lower() in IMAGE_EXTENSIONS and not path.name.startswith(".")


def decode(file: BinaryIO, name: str, min_side: int | None = None) -> Image.Image:
    """Decode one picture completely; animated files give their first frame.

    Args:
        file: open for reading; it may be closed afterwards.
        name: used in the error.
        min_side: pixels. A JPEG may then be decoded at 1/2, 1/4 or 1/8 of its size, several times
            faster, as long as both sides stay at least this long.

    Raises:
        UndecodableImage: empty, truncated, damaged or unknown files, and pictures of more than
            `PIL.Image.MAX_IMAGE_PIXELS` pixels.
    """
    try:
        if not file.seek(0, io.SEEK_END):
            raise ValueError("the file is empty")
        image = Image.open(file, formats=known_formats())
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and image.width * image.height > limit:
            raise ValueError(f"{image.width} x {image.height} pixels, more than the limit of {limit}")
        if min_side is not None:
            image.draft(None, (min_side, min_side))
        image.load()
    except Exception as error:  # damaged files make PIL's decoders raise nearly anything
        raise UndecodableImage(name, reason_of(error)) from error
    return image


def printable(name: str) -> str:
    """A file name with bytes that are not UTF-8 replaced, so that it can be written anywhere."""
    return os.fsencode(name).decode("utf-8", "replace")


@functools.cache
def known_formats() -> tuple[str, ...]:
    """Those of FORMATS that this build of PIL reads. Others stay closed: some of them start programs."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def reason_of(error: Exception) -> str:
    """One line that says what went wrong, without the object addresses that PIL puts in its messages."""
    text = " ".join(str(error).split())
    if text.startswith("cannot identify image file"):
        return "not an image in a known format"
    return text[:200] or type(error).__name__
